// Picket is a monitoring agent in one static binary, for machines too small,
// too old or too odd for anything else.
//
// It is passive: the monitor sends a command over XML-RPC, with a ticket. The
// agent acknowledges the command at once, does the work (most often it runs a
// sensor: any program that prints one number) and hands in the reading, with
// the same ticket, over a connection that it opens itself to the one monitor
// named in client.cfg. Whoever merely asks gets an acknowledgement and no data.
//
//	picket [-c client.cfg] [command]
//
// Without a command it runs the agent in the foreground until SIGTERM or
// SIGINT; it never forks, an init supervises it. On SIGHUP it reads its
// configuration and certificates again, on SIGUSR1 it logs its health. The
// other commands are for an administrator on the box; "picket help" lists them.
//
// # Trust
//
// The agent runs what is installed in its directory of sensors and nothing
// else; only its monitor can change that, or, with [sensor] public_key, whoever
// has the secret key. A command only chooses a sensor and gives it arguments,
// which no shell ever sees. What it measured goes to the monitor of client.cfg
// or nowhere. Whoever can reach its port, and passes [agent] allow and
// client_ca, can have sensors run, at most [sensor] concurrency at once, but
// cannot see what they print.
//
// # What lasts
//
// A reading of an acknowledged command is in memory until the monitor has
// answered, and with [monitor] spool on the disk from the first failed attempt
// on. Limits, and what happens at each, are with the constants.
//
// # Files
//
// They depend downwards: main, update, sensors, rpc. The settings of config are
// used by main alone; its functions that read, lock and replace files, by all.
//
// # The way of a reading
//
//  1. handler.ServeHTTP checks the caller, the path and the size of a request.
//  2. decodeCall reads the method and its parameters.
//  3. agent.submitReading makes a command of them: ticket, sensor, arguments.
//  4. queue.accept gives it a place, or waits for one. The answer is OK.
//  5. queue.start runs it when it is the turn of its caller.
//  6. agent.runCommand waits until the delivery has room for a reading.
//  7. sensors.runIn starts the executable, waits for its end and reaps it.
//  8. sensors.read makes a reading of exit code and output.
//  9. queue.finish hands it to delivery.put.
//  10. delivery.next chooses it, try stores it at the monitor, and record forgets
//     it or keeps it for another attempt, in the spool as well.
//
// # The way of an update
//
//  1. agent.submitChange makes a command of sensor and ticket.
//  2. queue.accept gives it a place. When it begins, equal ones that wait join it.
//  3. agent.runChange calls updater.install, which takes the steps of a change.
//  4. begin opens the directories and locks them; settle finishes an earlier change.
//  5. fetch writes the package to the staging directory.
//  6. verify checks its signature.
//  7. unpack unpacks it there; checkVersion refuses an older version.
//  8. try runs it once, for its help text; giveAway gives it to its owner.
//  9. replace links or copies the installed version to a hidden backup, decides by
//     one rename, publishes the backup and swaps the versions.
//  10. prune and settle remove what is left over; the outcome, 1 or nan, is
//     delivered like a reading.
package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/syslog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	sensorsTime = 5 * time.Second  // for running sensors when the agent ends
	deliverTime = 5 * time.Second  // for undelivered readings after that
	reloadTime  = time.Second      // between two reads of client.cfg that must be equal
	reloadTries = 10               // before a file that does not rest is refused
	initTime    = 30 * time.Second // an agent that init started waits this long before it ends with an error
	lastLogTime = time.Second      // for the last lines of the log when the agent ends

	maxServed = 4 << 20 // bytes of a package that the stand-in monitor serves
	logLines  = 256     // lines of the log that wait to be written

	spareThreads = 6 // beside those that run Go code: for files, names and signals
)

// Exit codes of the process. That of picket check is the sensor's.
const (
	exitFailed = 1
	exitUsage  = 2 // or configuration
)

// The linker writes these into the binary. Without it the Go toolchain's own
// stamp is used.
var (
	release string // as git describes the source
	built   string // when the source was committed, in seconds since 1970
)

func main() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGUSR1) // before anything else: an init may be quick
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, func() { signal.Reset(syscall.SIGINT) }) // a second one ends the process at once
	log.SetFlags(0)
	log.SetOutput(plainLog{os.Stderr})
	closeOnExec()
	time.Local = localZone()
	out := &output{w: os.Stdout}
	err := execute(ctx, signals, os.Args[1:], out)
	if err == nil {
		err = out.err
	}
	if err == nil {
		return
	}
	coded := &exitError{exitFailed, err}
	if errors.As(err, &coded); coded.err != nil {
		log.Print(coded.err)
	}
	os.Exit(coded.code)
}

// closeOnExec marks every file above 2 that picket's parent left open to be
// closed when a sensor starts: it may be a lock or a secret.
func closeOnExec() {
	var limit syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	files, err := os.ReadDir("/proc/self/fd")
	for _, f := range files {
		if fd, err := strconv.Atoi(f.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
	for fd := 3; err != nil && fd < int(min(limit.Cur, 1<<16)); fd++ { // there is no /proc
		syscall.CloseOnExec(fd)
	}
}

// leaveTerminal gives up the controlling terminal, so that no sensor can open
// /dev/tty, read what is typed there or type into it. ^C still arrives, unless
// picket leads the session of the terminal. Then the kernel also sends SIGHUP,
// which is ignored for this moment.
func leaveTerminal(signals chan<- os.Signal) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		return // there is none
	}
	defer tty.Close()
	signal.Ignore(syscall.SIGHUP)
	defer signal.Notify(signals, syscall.SIGHUP)
	syscall.Syscall(syscall.SYS_IOCTL, tty.Fd(), syscall.TIOCNOTTY, 0)
}

// An output remembers that something could not be written to it.
type output struct {
	w   io.Writer
	err error
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	if err != nil && o.err == nil {
		o.err = fmt.Errorf("write the output: %w", err)
	}
	return n, err
}

// An exitError ends the process with a code of its own, and with a message
// where err is not nil.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return fmt.Sprint(e.err) }
func (e *exitError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// A subcommand is a command of the command line.
type subcommand struct {
	name, args, help string
	least, most      int // arguments; most < 0: any number
	needs            int // what execute does before
	run              func(context.Context, invocation) error
}

// What a subcommand needs.
const (
	needsNothing  = iota
	needsFile     // the path of client.cfg
	needsNoTTY    // the terminal given up, as it runs sensors
	needsSettings // all of these, and the settings
)

func subcommands() []subcommand {
	const tlsArgs = "[-ca FILE] [-cert FILE -key FILE]"
	return []subcommand{
		{"", "", "run the agent until SIGTERM or SIGINT", 0, 0, needsNoTTY, runUnderInit},
		{"check", "SENSOR [ARG...]", "run one sensor as the agent would", 1, -1, needsSettings, runCheck},
		{"list", "", "the sensors, what they can be asked", 0, 0, needsSettings, runList},
		{"config", "", "check client.cfg, print every option", 0, 0, needsFile, runConfig},
		{"config get", "SECTION OPTION", "print one value", 2, 2, needsFile, runConfigGet},
		{"config set", "SECTION OPTION VALUE [SECTION OPTION VALUE...]", "change values in place",
			3, -1, needsFile, runConfigSet},
		{"config unset", "SECTION [OPTION]", "remove an option or a section", 1, 2, needsFile, runConfigUnset},
		{"update", "SENSOR", "fetch a package and install it", 1, 1, needsSettings, runUpdate},
		{"rollback", "SENSOR", "put the newest backup back in place", 1, 1, needsSettings, runRollback},
		{"install", "FILE.tar.bz2", "install a package that lies here", 1, 1, needsSettings, runInstall},
		{"call", tlsArgs + " URL METHOD [ARG...]", "call an XML-RPC method", 2, -1, needsNothing, runCall},
		{"monitor", "[-listen ADDRESS] [-packages DIR] [-next URL]\n    " + tlsArgs,
			"a stand-in that prints readings", 0, -1, needsNothing, runMonitor},
		{"selftest", "", "prove that all works on this box", 0, 0, needsNoTTY, runSelftest},
		{"version", "", "version, commit, Go, architecture", 0, 0, needsNothing, runVersion},
		{"help", "", "this page", 0, -1, needsNothing, runHelp},
	}
}

// An invocation is one call of the program.
type invocation struct {
	config   string // the -c of the command line
	signals  <-chan os.Signal
	usage    string
	args     []string
	out      io.Writer
	file     string // client.cfg, where it is needed
	settings settings
}

func (in invocation) usageError() error { return usagef("usage: %s", in.usage) }

// execute runs the program with the arguments of its command line. Its error
// shows no password.
func execute(ctx context.Context, signals chan os.Signal, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("picket", flag.ContinueOnError)
	in := invocation{signals: signals, out: out}
	flags.StringVar(&in.config, "c", "", "")
	if err := in.parse(flags, args); err != nil {
		return err
	}
	c, err := in.findSubcommand()
	if err == nil && c.needs >= needsNoTTY {
		leaveTerminal(signals)
	} else if err == nil { // signals that mean something to an agent only
		signal.Reset(syscall.SIGHUP, syscall.SIGUSR1)
	}
	if err == nil && (c.needs == needsFile || c.needs == needsSettings) {
		in.file, err = findConfig(in.config)
	}
	if err == nil && c.needs == needsSettings {
		in.settings, err = readSettings(in.file)
	}
	if err == nil {
		err = c.run(ctx, in)
	}
	coded := &exitError{exitFailed, err}
	if errors.As(err, &coded); coded.err != nil {
		return &exitError{coded.code, maskedError{err}}
	}
	return err
}

// parse parses flags and keeps the other arguments. What there is to print is
// printed by picket, not by the flag package.
func (in *invocation) parse(flags *flag.FlagSet, args []string) error {
	flags.SetOutput(io.Discard)
	err := flags.Parse(args)
	in.args = flags.Args()
	if errors.Is(err, flag.ErrHelp) {
		runHelp(context.Background(), *in)
		return &exitError{}
	}
	if err != nil {
		return usagef("%v; see picket help", err)
	}
	return nil
}

// findSubcommand returns the subcommand that the arguments begin with, keeps
// those behind its name and checks their number.
func (in *invocation) findSubcommand() (subcommand, error) {
	all := subcommands()
	found := -1
	for n := min(len(in.args), 2); n > 0 && found < 0; n-- {
		name := strings.Join(in.args[:n], " ")
		if found = slices.IndexFunc(all, func(c subcommand) bool { return c.name == name }); found >= 0 {
			in.args = in.args[n:]
		}
	}
	if found < 0 && len(in.args) > 0 {
		return subcommand{}, usagef("unknown command %q; see picket help", in.args[0])
	}
	c := all[max(found, 0)]
	if c.name == "config" && len(in.args) > 0 {
		return c, usagef("unknown command %q; see picket help", "config "+in.args[0])
	}
	in.usage = strings.Join(strings.Fields("picket "+c.name+" "+c.args), " ")
	if n := len(in.args); n < c.least || c.most >= 0 && n > c.most {
		return c, in.usageError()
	}
	return c, nil
}

func runHelp(_ context.Context, in invocation) error {
	fmt.Fprint(in.out, "usage: picket [-c client.cfg] [command]\n\n")
	for _, c := range subcommands() {
		words := strings.TrimSpace(c.name + " " + c.args)
		if words == "" {
			words = "(none)"
		}
		gap := " "
		if len(words) > 33 {
			gap = "\n" + strings.Repeat(" ", 36)
		}
		fmt.Fprintf(in.out, "  %-33s%s%s\n", words, gap, c.help)
	}
	fmt.Fprint(in.out, "\nclient.cfg is looked for in the working directory, then beside the program.\n"+
		"Exit codes: 0; 1 it went wrong; 2 usage or configuration; check: the sensor's.\n")
	return nil
}

func runVersion(_ context.Context, in invocation) error {
	fmt.Fprintln(in.out, "picket", version())
	return nil
}

// version describes the binary by what the linker or the toolchain wrote into it.
func version() string {
	name, arch := release, runtime.GOARCH
	if name == "" {
		name = strings.TrimSpace("(devel) " + stamp("vcs.revision"))
	}
	for _, key := range []string{"GOARM", "GO386", "GOMIPS", "GOMIPS64"} {
		if value := stamp(key); value != "" {
			arch += "," + value
		}
	}
	return fmt.Sprintf("%s %s %s/%s", name, runtime.Version(), runtime.GOOS, arch)
}

// buildTime returns when the program was built or, by the toolchain's stamp,
// when its source was committed; zero where neither is known.
func buildTime() time.Time {
	if n, err := strconv.ParseInt(built, 10, 64); err == nil {
		return time.Unix(n, 0)
	}
	t, _ := time.Parse(time.RFC3339, stamp("vcs.time"))
	return t
}

// stamp returns what the toolchain noted of the build under a key, "" for nothing.
func stamp(key string) string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == key {
				return s.Value
			}
		}
	}
	return ""
}

// findConfig returns the path of client.cfg: the one that was named, else the
// one in the working directory, else the one beside the program, links followed.
func findConfig(named string) (string, error) {
	if named != "" {
		if _, err := os.Stat(named); err != nil {
			return "", &exitError{exitUsage, err}
		}
		return filepath.Abs(named)
	}
	var tried []string
	here, _ := os.Getwd() // "" where there is none, as for the program
	program, err := os.Executable()
	if err == nil {
		program, _ = filepath.EvalSymlinks(program)
	}
	for _, dir := range []string{here, filepath.Dir(program)} {
		file := filepath.Join(dir, "client.cfg")
		if _, err := os.Lstat(file); filepath.IsAbs(file) && err == nil {
			return file, nil
		}
		if !slices.Contains(tried, file) {
			tried = append(tried, file)
		}
	}
	return "", usagef("no client.cfg: looked for %s; -c names another", strings.Join(tried, ", then "))
}

// readSettings returns the settings of a file.
func readSettings(file string) (settings, error) {
	c, err := readINI(file)
	if err != nil {
		return settings{}, &exitError{exitUsage, err}
	}
	return checkSettings(c)
}

// checkSettings returns the settings of a text, and logs the warnings.
func checkSettings(c *ini) (settings, error) {
	s, warnings, err := c.settings(filepath.Dir(c.name))
	for _, w := range warnings {
		log.Print(warning + w)
	}
	if err != nil {
		return settings{}, &exitError{exitUsage, err}
	}
	s.file = c.name
	return s, nil
}

// checkKeys returns an error where [sensor] public_key holds no key. An agent
// starts all the same, but takes no packages.
func checkKeys(c *ini, s settings) error {
	if s.publicKey == "" {
		return nil
	}
	if _, err := readKeys(s.publicKey); err != nil {
		return c.errorAt("sensor", "public_key", err)
	}
	return nil
}

// runUnderInit runs the agent. Process 1 would start an agent that ends with
// an error, say for a wrong client.cfg, again without a pause: so under process
// 1 it waits first, 30 s or until a signal comes.
func runUnderInit(ctx context.Context, in invocation) error {
	err := runAgent(ctx, in)
	if err == nil || os.Getppid() != 1 {
		return err
	}
	log.Printf("%v; ends in %v, or at a signal", maskedError{err}, initTime)
	select {
	case <-time.After(initTime):
	case <-in.signals:
	case <-ctx.Done():
	}
	code := exitFailed
	if coded := (*exitError)(nil); errors.As(err, &coded) {
		code = coded.code
	}
	return &exitError{code: code}
}

func runAgent(ctx context.Context, in invocation) error {
	// Caught and dropped: a reader of the log that ends, or a file that may not
	// grow, must not end the agent. Ignored, they would be ignored in sensors too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE, syscall.SIGXFSZ)
	logs := newLogWriter(os.Stderr)
	log.SetOutput(logs)
	defer logs.close()
	file, err := findConfig(in.config)
	if err != nil {
		return err
	}
	s, err := readSettings(file)
	if err != nil {
		return err
	}
	a, err := newAgent(s)
	if err != nil {
		return err
	}
	a.signals = in.signals
	a.applied = func(s settings) { logs.useSyslog.Store(s.syslog); limitMemory(s) }
	a.applied(s)
	if os.Getenv("GOGC") == "" { // collect when the heap has grown by a quarter; later, as it delays the first answer
		defer time.AfterFunc(time.Second, func() { debug.SetGCPercent(25) }).Stop()
	}
	a.recover(ctx)
	return a.run(ctx)
}

// limitMemory makes the collector of garbage work harder from 12 MiB on, plus
// what a full queue and a full spool take. GOMEMLIMIT in the environment has
// precedence.
func limitMemory(s settings) {
	limit := int64(12<<20) + int64(s.queue)<<10
	if s.spool != "" {
		limit += 6 * s.spoolSize
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(limit)
	}
}

// splitSeverity returns a line of the log without its mark of severity, and
// that mark, "" for information.
func splitSeverity(line string) (mark, text string) {
	if len(line) > len(severe) && slices.Contains([]string{severe, warning, notice}, line[:len(severe)]) {
		return line[:len(severe)], line[len(severe):]
	}
	return "", line
}

// A plainLog writes lines of the log for people.
type plainLog struct{ w io.Writer }

func (p plainLog) Write(line []byte) (int, error) {
	_, text := splitSeverity(string(line))
	_, err := io.WriteString(p.w, "picket: "+text)
	return len(line), err
}

// A logWriter writes the log to standard error or to the local syslog, from a
// goroutine of its own: nobody who logs waits for either. While they take
// nothing, 256 lines wait; further ones are counted and lost. Where there is no
// syslog, lines go to standard error.
type logWriter struct {
	stderr    io.Writer
	lines     chan string
	lost      atomic.Int64
	useSyslog atomic.Bool
	done      chan struct{}

	// Only the goroutine uses these.
	syslog *syslog.Writer
	absent bool // syslog is
}

func newLogWriter(stderr io.Writer) *logWriter {
	w := &logWriter{stderr: stderr, lines: make(chan string, logLines), done: make(chan struct{})}
	go w.run()
	return w
}

func (w *logWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- string(line):
	default:
		w.lost.Add(1)
	}
	return len(line), nil
}

// close writes what waits, but takes a second at most. Later lines are written
// straight to standard error.
func (w *logWriter) close() {
	log.SetOutput(plainLog{w.stderr})
	close(w.lines)
	select {
	case <-w.done:
	case <-time.After(lastLogTime):
	}
}

func (w *logWriter) run() {
	defer close(w.done)
	for line := range w.lines {
		if n := w.lost.Swap(0); n > 0 {
			w.print(fmt.Sprintf(warning+"%s of the log lost: nobody took them\n", plural(int(n), "line")))
		}
		w.print(line)
	}
}

func (w *logWriter) print(line string) {
	var err error
	if w.useSyslog.Load() {
		if err = w.printSyslog(line); err == nil {
			w.absent = false
			return
		}
		if !w.absent {
			fmt.Fprintf(plainLog{w.stderr}, "log to syslog: %v; standard error instead\n", err)
		}
	}
	w.absent = err != nil
	plainLog{w.stderr}.Write([]byte(line))
}

func (w *logWriter) printSyslog(line string) (err error) {
	if w.syslog == nil {
		if w.syslog, err = syslog.New(syslog.LOG_DAEMON, "picket"); err != nil {
			return err
		}
	}
	mark, text := splitSeverity(line)
	print := map[string]func(string) error{
		severe: w.syslog.Err, warning: w.syslog.Warning, notice: w.syslog.Notice, "": w.syslog.Info,
	}[mark]
	for _, text := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		err = errors.Join(err, print(text))
	}
	return err
}

// Active is the settings in force and what was built from them.
type active struct {
	settings settings
	sensors  *sensors
	updater  *updater
}

// An agent answers commands and hands in readings.
type agent struct {
	active   atomic.Pointer[active]
	handler  *handler
	delivery *delivery
	queue    *queue
	events   logLimit // for commands and runs: a busy monitor must not fill a log
	started  time.Time
	signals  <-chan os.Signal // SIGHUP and SIGUSR1
	applied  func(settings)   // is called with new settings

	ctx    context.Context // for work that has no place in the queue
	cancel context.CancelFunc

	changing sync.Mutex // held while new settings are applied or client.cfg is written
	listener net.Listener
	served   chan error // why a listener is no longer served
}

// newAgent returns an agent that listens but does not answer yet: run does.
func newAgent(s settings) (*agent, error) {
	listener, err := net.Listen("tcp", s.listen)
	if err != nil {
		return nil, fmt.Errorf("[agent] listen: %w", err)
	}
	a := &agent{
		listener: listener, events: logLimit{burst: 1000, perSecond: 10}, started: time.Now(),
		served: make(chan error, 1), applied: func(settings) {},
	}
	a.active.Store(activate(s))
	a.handler = newHandler(a.commands())
	a.handler.setAccess(&access{s.allow, serverTLS(s.agentTLS)})
	spool := newSpool(s.spool, s.spoolSize)
	a.delivery = newDelivery(monitorClient(s), readingZone(s), s.noValue, time.Second, spool)
	a.queue = newQueue(s.concurrency, s.queue, a.runCommand, a.delivery.put, a.delivery.discard)
	a.ctx, a.cancel = context.WithCancel(context.Background())
	return a, nil
}

// activate builds what settings describe.
func activate(s settings) *active {
	sensors := newSensors(s.path, s.executable, s.help, s.timeout, s.user)
	return &active{s, sensors, newUpdater(sensors, s.backup, s.publicKey, s.maxPackage, s.maxUnpacked, s.keep)}
}

// readingZone returns the zone in which the times of readings are sent.
func readingZone(s settings) *time.Location {
	if s.utc {
		return time.UTC
	}
	return time.Local
}

func monitorClient(s settings) *client {
	return newClient(s.monitor, s.monitorTimeout, clientTLS(s.monitorTLS))
}

// clientTLS returns the rules for calls over https.
func clientTLS(t tlsFiles) *tls.Config {
	c := newTLS(buildTime())
	c.RootCAs = t.pool
	if t.pair != nil {
		c.Certificates = []tls.Certificate{*t.pair}
	}
	return c
}

// serverTLS returns the rules for being called over TLS; nil means without TLS.
func serverTLS(t tlsFiles) *tls.Config {
	if t.pair == nil {
		return nil
	}
	c := newTLS(buildTime())
	c.Certificates = []tls.Certificate{*t.pair}
	if t.pool == nil {
		return c
	}
	c.ClientCAs, c.ClientAuth = t.pool, tls.RequireAndVerifyClientCert
	// Unlike VerifyPeerCertificate this is called for a resumed session too.
	c.VerifyConnection = func(state tls.ConnectionState) error {
		if peer := state.PeerCertificates[0]; t.name != "" && !bearsName(peer, t.name) {
			return fmt.Errorf("the certificate of %s does not bear the name %s", cut(peer.Subject.String()), cut(t.name))
		}
		return nil
	}
	return c
}

// recover finishes or undoes what a power cut interrupted. Where it cannot, as
// on a read-only file system, the agent runs all the same.
func (a *agent) recover(ctx context.Context) {
	now := a.active.Load()
	if err := now.updater.recover(ctx); err != nil {
		log.Printf(warning+"recover sensors: %v", err)
	}
	if err := recoverINI(now.settings.file); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		log.Printf(warning+"recover %s: %v", now.settings.file, err)
	}
}

// run answers commands until ctx ends. Then it takes no more, gives running
// sensors five seconds and undelivered readings another five, and leaves no
// goroutine and no process behind.
func (a *agent) run(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := a.active.Load().settings
	log.Printf(notice+"%s on %s, sensors in %s, monitor %s",
		version(), a.listener.Addr(), s.path, s.monitor.Redacted())
	a.logWarnings()
	var beside sync.WaitGroup
	beside.Add(1)
	go func() { defer beside.Done(); a.handleSignals(ctx) }()
	if os.Getpid() == 1 {
		beside.Add(1)
		go func() { defer beside.Done(); a.active.Load().sensors.reapOrphans(ctx) }()
	}
	a.serve(a.listener)
	reserveThreads(runtime.GOMAXPROCS(0) + spareThreads) // before a sensor can use them all up
	select {
	case <-ctx.Done():
		log.Print(notice + "ending")
	case err = <-a.served:
		cancel()
	}
	a.cancel()
	a.delivery.putLast()
	within(sensorsTime, a.queue.close)
	beside.Wait()
	a.active.Load().sensors.awaitListing()
	within(time.Second, func(ctx context.Context) {
		if a.handler.http.Shutdown(ctx) != nil {
			a.handler.http.Close()
		}
	})
	within(deliverTime, a.delivery.close)
	return err
}

// within calls f with a context that ends after d.
func within(d time.Duration, f func(context.Context)) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	f(ctx)
}

// logWarnings logs what is allowed, but perhaps not meant.
func (a *agent) logWarnings() {
	now := a.active.Load()
	if text := noSensors(now.sensors); text != "" {
		log.Print(warning + text)
	}
	if _, err := os.Stat(filepath.Join(now.settings.path, ownSensor)); err == nil {
		log.Printf(warning+"sensor %s: its directory is not used: the agent itself answers to that name", ownSensor)
	}
	if text := now.updater.ownerWarning(); text != "" {
		log.Print(warning + text)
	}
	if keys := now.settings.publicKey; keys != "" {
		if _, err := readKeys(keys); err != nil {
			log.Printf(severe+"[sensor] public_key: %v: no package is taken", err)
		}
	}
	if len(now.settings.allow) == 0 && now.settings.agentTLS.ca == "" {
		log.Printf(notice+"[agent] allow is empty: whoever reaches %s can command the agent", a.listener.Addr())
	}
}

// serve answers calls to a listener until it is closed.
func (a *agent) serve(l net.Listener) {
	go func() {
		if err := a.handler.serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			a.served <- fmt.Errorf("serve %s: %w", l.Addr(), err)
		}
	}()
}

// handleSignals does what signals ask until ctx ends.
func (a *agent) handleSignals(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-a.signals:
			switch s {
			case syscall.SIGHUP:
				a.reload(ctx)
			case syscall.SIGUSR1:
				log.Print(notice + a.healthLine())
			}
		}
	}
}

// reload reads client.cfg again. Valid settings come into force, all of them;
// else everything stays as it was. Commands that wait, sensors that run and
// undelivered readings are not touched.
func (a *agent) reload(ctx context.Context) {
	a.changing.Lock()
	defer a.changing.Unlock()
	before := a.active.Load()
	s, err := rereadSettings(ctx, &before.settings)
	if ctx.Err() != nil {
		return // the agent ends
	}
	if err == nil && s.listen != before.settings.listen {
		err = a.relisten(s.listen)
	}
	if err != nil {
		for _, line := range strings.Split(maskedError{err}.Error(), "\n") {
			log.Printf(severe+"reload: %s", line)
		}
		log.Print(severe + "reload: the settings before stay in force")
		return
	}
	now := activate(s)
	now.sensors.runState = before.sensors.runState
	a.active.Store(now)
	a.queue.resize(s.concurrency, s.queue)
	access := &access{s.allow, serverTLS(s.agentTLS)}
	if s.agentTLS.equal(before.settings.agentTLS) { // so that connections may stay
		access.tls = a.handler.rules().tls
	}
	a.handler.setAccess(access)
	a.delivery.configure(monitorClient(s), readingZone(s), s.noValue)
	if s.spool != before.settings.spool || s.spoolSize != before.settings.spoolSize {
		log.Print(notice + "reload: [monitor] spool and spool_size are in force at the next start")
	}
	a.applied(s)
	log.Printf(notice+"reload: %s is in force; on %s, monitor %s", s.file, a.listener.Addr(), s.monitor.Redacted())
	a.logWarnings()
}

// rereadSettings returns the settings of client.cfg as soon as two reads of it,
// a second apart, are equal: it may be half written. It refuses settings that
// lack a protection which is in force.
func rereadSettings(ctx context.Context, before *settings) (s settings, err error) {
	text, err := readSmall(before.file, maxConfig)
	for same, tries := false, 0; err == nil && !same; tries++ {
		if tries == reloadTries {
			return s, fmt.Errorf("%s: still changing after %v", before.file, reloadTries*reloadTime)
		}
		select {
		case <-time.After(reloadTime):
		case <-ctx.Done():
			return s, ctx.Err()
		}
		earlier := text
		text, err = readSmall(before.file, maxConfig)
		same = bytes.Equal(text, earlier)
	}
	if err != nil {
		return s, err
	}
	c, err := parseINI(before.file, string(text))
	if err == nil {
		s, err = checkSettings(c)
	}
	if lost := before.lost(&s); err == nil && len(lost) > 0 {
		err = fmt.Errorf("%s: it lacks %s: a reload gives up no protection that is in force, only a start does",
			before.file, strings.Join(lost, ", "))
	}
	return s, err
}

// relisten takes commands at another address. Where the old listener may be in
// the way it is closed first, and opened again if that did not help.
func (a *agent) relisten(address string) error {
	old := a.listener.Addr().String()
	l, err := net.Listen("tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		a.listener.Close()
		if l, err = net.Listen("tcp", address); err != nil {
			again, errAgain := net.Listen("tcp", old)
			if errAgain != nil {
				select {
				case a.served <- fmt.Errorf("listen: %w", errors.Join(err, errAgain)):
				default: // there is a reason to end already
				}
				return err
			}
			a.listener = again
			a.serve(again)
		}
	}
	if err != nil {
		return fmt.Errorf("[agent] listen: %w", err)
	}
	a.listener.Close()
	a.listener = l
	a.serve(l)
	return nil
}

// ownSensor is the name of the sensor that is the agent itself.
const ownSensor = "picket"

// Vitals are what its health is read from, at one moment.
type vitals struct {
	*agent
	deliveryTotals
}

// health lists what it can be asked. A value is "" where there is none yet.
var health = []struct {
	name, help string
	value      func(vitals) any
}{
	{"uptime", "seconds since the agent started", func(v vitals) any { return seconds(v.started) }},
	{"queued", "commands that wait", func(v vitals) any { return v.queue.count() }},
	{"running", "sensors that run", func(v vitals) any { return v.active.Load().sensors.running() }},
	{"undelivered", "readings that the monitor does not have yet", func(v vitals) any { return v.undelivered }},
	{"delivered", "readings delivered since the start", func(v vitals) any { return v.delivered }},
	{"dropped", "readings given up since the start", func(v vitals) any { return v.dropped }},
	{"refused", "calls refused since the start", func(v vitals) any { return v.handler.count.Load() }},
	{"rss_kb", "resident memory in KiB", func(vitals) any { return residentKiB() }},
	{"spool_bytes", "size of the spool", func(v vitals) any { return v.spoolBytes }},
	{"last_delivery_age", "seconds since the latest delivery", func(v vitals) any { return seconds(v.latest) }},
}

// seconds returns how many have passed since t, "" for the zero time.
func seconds(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return strconv.FormatFloat(time.Since(t).Seconds(), 'f', 0, 64)
}

// residentKiB returns the resident memory of this process, "" without a /proc.
func residentKiB() string {
	var all, resident int
	text, _ := os.ReadFile("/proc/self/statm")
	if _, err := fmt.Sscan(string(text), &all, &resident); err != nil {
		return ""
	}
	return fmt.Sprint(resident * (os.Getpagesize() >> 10))
}

// ownReading returns a reading of the agent itself.
func (a *agent) ownReading(args []string) reading {
	for _, h := range health {
		if len(args) != 1 || args[0] != h.name {
			continue
		}
		if value := fmt.Sprint(h.value(vitals{a, a.delivery.count()})); value != "" {
			return reading{value: value, taken: time.Now()}
		}
		return reading{code: exitFailed, taken: time.Now(), reason: h.name + ": there is none yet"}
	}
	reason := fmt.Sprintf("takes one of its options, not %s", cut(strings.Join(args, " ")))
	return reading{code: exitUsage, taken: time.Now(), reason: reason}
}

// ownHelp returns the help text of the sensor that is the agent itself.
func ownHelp() string {
	var lines []string
	for _, h := range health {
		lines = append(lines, fmt.Sprintf("%-18s %s", h.name, h.help))
	}
	return strings.Join(lines, "\n")
}

// healthLine returns the agent's health in one line, as of one moment.
func (a *agent) healthLine() string {
	line, now := "health:", vitals{a, a.delivery.count()}
	for _, h := range health {
		value := h.value(now)
		if value == "" {
			value = "-"
		}
		line += fmt.Sprint(" ", h.name, " ", value)
	}
	return line
}

// noSensors says so where there is nothing to run, and else returns "". It is
// no error, as sensors can still be installed, but most often a mistake.
func noSensors(s *sensors) string {
	names, _, err := s.names()
	switch {
	case err != nil:
		return err.Error()
	case len(names) == 0:
		return fmt.Sprintf("no sensors in %s", s.path)
	}
	return ""
}

// commands lists all that the monitor can ask, beside what every XML-RPC server
// answers.
func (a *agent) commands() []method {
	const done = " Returns OK at once; stores exit code 0 and value 1 when it is done."
	return []method{
		{
			"cmd_submit_reading",
			"string int string, string int string array, string int string string, " +
				"string i8 string, string i8 string array, string i8 string string, " +
				"string string string, string string string array, string string string string",
			"cmd_submit_reading(ticket, sensor, [arguments]): runs a sensor and stores the reading at the monitor " +
				"with cmd_store_probe_data. Returns OK at once.",
			a.submitReading,
		}, {
			"cmd_update_sensor_code", "string string, string string int, string string string",
			"cmd_update_sensor_code(sensor, [ticket]): fetches the sensor's package with cmd_get_sensor_code, " +
				"tries it and installs it." + done,
			func(r request, params []any) (any, error) {
				return a.submitChange(r, "cmd_update_sensor_code", "update", params)
			},
		}, {
			"cmd_rollback_sensor_code", "string string, string string int, string string string",
			"cmd_rollback_sensor_code(sensor, [ticket]): puts the newest backup of the sensor back in its place." + done,
			func(r request, params []any) (any, error) {
				return a.submitChange(r, "cmd_rollback_sensor_code", "rollback", params)
			},
		}, {
			"cmd_register_new_server", "string, string int, string string",
			"cmd_register_new_server([ticket]): asks for another monitor with cmd_get_new_monitor_url, " +
				"and moves there if its healthcheck answers OK." + done,
			func(r request, params []any) (any, error) {
				return a.submitChange(r, "cmd_register_new_server", "move", params)
			},
		},
		{"cmd_list_sensors", "struct", "cmd_list_sensors(): the help text of each sensor, by its name.", a.listSensors},
		{"healthcheck", "string", "healthcheck(): OK.", healthcheck},
	}
}

func (a *agent) submitReading(r request, params []any) (any, error) {
	const name = "cmd_submit_reading"
	if len(params) < 2 || len(params) > 3 {
		return nil, faultf(faultParams, "%s takes ticket, sensor, [arguments]; got %s",
			name, plural(len(params), "parameter"))
	}
	var c command
	var err error
	if c.ticket, err = ticketOf(params[0]); err == nil {
		c.sensor, err = sensorName(params[1])
	}
	if err == nil && len(params) == 3 {
		c.args, err = arguments(params[2])
	}
	return a.accept(r, name, c, err)
}

// submitChange takes the parameters sensor, [ticket]; of a move, [ticket] alone.
func (a *agent) submitChange(r request, name, change string, params []any) (any, error) {
	c := command{change: change}
	var err error
	if change != "move" {
		if len(params) == 0 {
			return nil, faultf(faultParams, "%s takes sensor, [ticket]", name)
		}
		c.sensor, err = sensorName(params[0])
		params = params[1:]
	}
	if len(params) > 1 {
		return nil, faultf(faultParams, "%s: %s too many", name, plural(len(params)-1, "parameter"))
	}
	if err == nil && len(params) == 1 && params[0] != nil {
		c.ticket, err = ticketOf(params[0])
	}
	return a.accept(r, name, c, err)
}

// accept puts a command into the queue, unless err says what is wrong with it.
// Where the queue is full it waits for room, as long as one run can take.
func (a *agent) accept(r request, name string, c command, err error) (any, error) {
	if err != nil {
		return nil, faultf(faultParams, "%s: %v", name, err)
	}
	a.events.printf("command %s from %s: %s, %s", name, r.peer, ticketText(c.ticket), c)
	c.from = limitKey(r.peer)
	longest := a.active.Load().settings.timeout + 2*killTime
	if err := a.queue.accept(r.ctx, c, r.received.Add(longest)); err != nil {
		return nil, err
	}
	return "OK", nil
}

// runCommand does what a command in the queue asks, and returns its reading.
func (a *agent) runCommand(ctx context.Context, c command) reading {
	a.delivery.waitRoom(ctx)
	if c.change != "" {
		return a.runChange(ctx, c)
	}
	begun := time.Now()
	var r reading
	if c.sensor == ownSensor {
		r = a.ownReading(c.args)
	} else {
		r = a.active.Load().sensors.read(ctx, c.sensor, c.args, nil)
	}
	line := fmt.Sprintf("%s: exit %d in %v: %s", c, r.code, time.Since(begun).Round(time.Millisecond), r.reason)
	a.events.printf("%s", strings.TrimSuffix(line, ": "))
	return r
}

// runChange makes a change and returns its outcome as a reading.
func (a *agent) runChange(ctx context.Context, c command) reading {
	begun := time.Now()
	if err := a.change(ctx, c); err != nil {
		a.events.printf(warning+"%s: %s", c, oneLine(err.Error()))
		return reading{code: exitFailed, taken: time.Now(), reason: err.Error()}
	}
	log.Printf(notice+"%s: done in %v", c, time.Since(begun).Round(time.Millisecond))
	debug.FreeOSMemory() // decompression took more than anything else does
	return reading{value: "1", taken: time.Now()}
}

// change changes a sensor, or the monitor that the agent belongs to. An error
// means that nothing has changed.
func (a *agent) change(ctx context.Context, c command) error {
	now := a.active.Load()
	switch {
	case c.change == "move":
		return a.move(ctx)
	case c.sensor == ownSensor:
		return errors.New("refused: it is built in")
	case !now.settings.update:
		return errors.New("refused: [sensor] update = no")
	case c.change == "rollback":
		return now.updater.rollback(ctx, c.sensor)
	}
	return now.updater.install(ctx, c.sensor, fromMonitor(a.delivery.monitor(), c.sensor, now.settings.maxPackage))
}

// move makes the monitor that the present one names the only one: in client.cfg
// first, then for every reading that is not delivered yet.
func (a *agent) move(ctx context.Context) error {
	present := a.delivery.monitor()
	u, err := nextMonitor(ctx, present, httpURL)
	if err != nil {
		return err
	}
	lock := sync.OnceFunc(a.changing.Lock) // only with the lock of client.cfg, for which no reload waits
	defer func() { lock(); a.changing.Unlock() }()
	err = editINI(ctx, a.active.Load().settings.file, func(c *ini) error {
		if lock(); a.delivery.monitor() != present {
			return errors.New("client.cfg was read again meanwhile")
		}
		return c.set("monitor", "url", u.String())
	})
	if err != nil {
		return err
	}
	now := *a.active.Load()
	now.settings.monitor = u
	a.active.Store(&now)
	a.delivery.configure(monitorClient(now.settings), readingZone(now.settings), now.settings.noValue)
	log.Printf(notice+"move: from now on the monitor is %s", u.Redacted())
	return nil
}

func (a *agent) listSensors(_ request, params []any) (any, error) {
	if err := noParams("cmd_list_sensors", params); err != nil {
		return nil, err
	}
	texts, err := a.active.Load().sensors.helpTexts(a.ctx) // also for a caller that has closed its sending half
	if a.ctx.Err() != nil {
		return nil, faultf(faultBusy, "the agent is shutting down")
	}
	if err != nil {
		a.handler.refused.printf(warning+"%v", err) // the agent's own text is left
		texts = make(map[string]string)
	}
	texts[ownSensor] = ownHelp()
	listed, left := fitHelps(texts)
	if left > 0 {
		a.handler.refused.printf(warning+"cmd_list_sensors: %s left out: the answer is full", plural(left, "sensor"))
	}
	return listed, nil
}

func healthcheck(_ request, params []any) (any, error) {
	return "OK", noParams("healthcheck", params)
}

func runCheck(ctx context.Context, in invocation) error {
	name, err := sensorOnDisk(in.args[0])
	if err != nil {
		return err
	}
	r := activate(in.settings).sensors.read(ctx, name, in.args[1:], os.Stderr)
	value, code := r.value, r.code
	if value == "" {
		value = in.settings.noValue
	}
	if code < 0 {
		code = 128 - code // as a shell shows a signal
	}
	fmt.Fprintln(in.out, value)
	switch {
	case code == 0:
		return nil
	case r.reason == "":
		return &exitError{code, nil}
	}
	return &exitError{code, fmt.Errorf("sensor %s: %s", name, r.reason)}
}

func runList(ctx context.Context, in invocation) error {
	sensors := activate(in.settings).sensors
	texts, err := sensors.helpTexts(ctx)
	if err != nil {
		return err
	}
	if len(texts) == 0 {
		return errors.New(noSensors(sensors))
	}
	texts[ownSensor] = ownHelp()
	_, unusable, _ := sensors.names()
	for _, name := range unusable {
		log.Printf(warning+"sensor %s: its name is not plain text of at most %d bytes", cut(name), maxName)
	}
	for _, name := range sortedKeys(texts) {
		fmt.Fprintf(in.out, "%s\n%s", name, indent(texts[name], "  "))
	}
	return nil
}

// sensorOnDisk returns v as the name of a sensor that is a directory.
func sensorOnDisk(v string) (string, error) {
	name, err := sensorName(v)
	if name == ownSensor {
		err = fmt.Errorf("the sensor %s is the agent itself: only a running one answers to that name, "+
			"and no other sensor can have it", ownSensor)
	}
	if err != nil {
		return "", &exitError{exitUsage, err}
	}
	return name, nil
}

// indent returns the lines of a text, each with something before it.
func indent(text, by string) string {
	return by + strings.ReplaceAll(text, "\n", "\n"+by) + "\n"
}

func runUpdate(ctx context.Context, in invocation) error {
	c := monitorClient(in.settings)
	defer c.close()
	return changeSensor(in, "update", in.args[0], func(u *updater, name string) error {
		return u.install(ctx, name, fromMonitor(c, name, in.settings.maxPackage))
	})
}

func runRollback(ctx context.Context, in invocation) error {
	return changeSensor(in, "rollback", in.args[0], func(u *updater, name string) error {
		return u.rollback(ctx, name)
	})
}

func runInstall(ctx context.Context, in invocation) error {
	name := filepath.Base(in.args[0])
	for _, suffix := range []string{".tar", ".tar.bz2", ".tar.gz", ".tbz2", ".tgz"} {
		if before, ok := strings.CutSuffix(name, suffix); ok {
			name = before
			break
		}
	}
	return changeSensor(in, "install", name, func(u *updater, name string) error {
		return u.install(ctx, name, fromFile(in.args[0]))
	})
}

// changeSensor makes a change of a sensor by hand. On a terminal it shows each step.
func changeSensor(in invocation, verb, name string, change func(u *updater, name string) error) error {
	name, err := sensorOnDisk(name)
	if err != nil {
		return err
	}
	u := activate(in.settings).updater
	if info, err := os.Stderr.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
		u.progress = func(step string) { fmt.Fprintf(os.Stderr, "\r\x1b[K%s", step) }
	}
	err = change(u, name)
	u.progress("") // leaves the line empty
	if err != nil {
		return fmt.Errorf("%s %s: %w", verb, name, err)
	}
	fmt.Fprintf(in.out, "%s %s: done\n", verb, name)
	return nil
}

// runConfig prints every option as INI, with its value or default. A password
// in a URL is not shown.
func runConfig(_ context.Context, in invocation) error {
	c, err := readINI(in.file)
	if err != nil {
		return &exitError{exitUsage, err}
	}
	s, err := checkSettings(c)
	if err == nil {
		err = checkKeys(c, s)
	}
	if err != nil {
		return &exitError{exitUsage, err}
	}
	if text := noSensors(activate(s).sensors); text != "" {
		log.Print(warning + text)
	}
	effective := &ini{name: in.file, values: make(map[iniKey]iniValue)}
	for _, o := range known {
		value, err := c.value(o.section, o.name)
		if err == nil {
			err = effective.set(o.section, o.name, redacted(value))
		}
		if err != nil {
			return err
		}
	}
	fmt.Fprintf(in.out, "# %s; paths start from its directory\n%s", in.file, effective.text())
	return nil
}

func runConfigGet(_ context.Context, in invocation) error {
	c, err := readINI(in.file)
	if err != nil {
		return &exitError{exitUsage, err}
	}
	value, err := c.value(in.args[0], in.args[1])
	if err == nil {
		fmt.Fprintln(in.out, redacted(value))
	}
	return err
}

func runConfigSet(ctx context.Context, in invocation) error {
	if len(in.args)%3 != 0 {
		return in.usageError()
	}
	return editConfig(ctx, in.file, true, func(c *ini) (err error) {
		for args := in.args; len(args) > 0 && err == nil; args = args[3:] {
			err = c.set(args[0], args[1], args[2])
		}
		return err
	})
}

func runConfigUnset(ctx context.Context, in invocation) error {
	return editConfig(ctx, in.file, false, func(c *ini) error { return c.remove(in.args[0], in.args[1:]...) })
}

// editConfig changes client.cfg. It refuses a change that makes valid settings
// wrong and, where strict is set, one that earns a new warning.
func editConfig(ctx context.Context, file string, strict bool, change func(*ini) error) error {
	var fresh []string
	err := editINI(ctx, file, func(c *ini) error {
		old, before := checkAll(c)
		if err := change(c); err != nil {
			return err
		}
		warnings, err := checkAll(c)
		if err != nil && before == nil {
			return usagef("not changed: %w", err)
		}
		for text, w := range warnings {
			if _, known := old[text]; !known {
				fresh = append(fresh, w)
			}
		}
		if strict && len(fresh) > 0 {
			return usagef("not changed: %s", fresh[0])
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, w := range fresh {
		log.Print(warning + w)
	}
	return nil
}

// checkAll checks the settings of a text and the key that they name. It returns
// the warnings by their text without the number of the line, which may change.
func checkAll(c *ini) (map[string]string, error) {
	s, list, err := c.settings(filepath.Dir(c.name))
	if err == nil {
		err = checkKeys(c, s)
	}
	warnings := make(map[string]string)
	for _, w := range list {
		rest := strings.TrimPrefix(w, c.name+":")
		warnings[rest[strings.Index(rest, ":")+1:]] = w
	}
	return warnings, err
}

// tlsFlags adds the flags that name certificates.
func tlsFlags(flags *flag.FlagSet) *tlsFiles {
	t := &tlsFiles{}
	flags.StringVar(&t.ca, "ca", "", "")
	flags.StringVar(&t.certificate, "cert", "", "")
	flags.StringVar(&t.key, "key", "", "")
	return t
}

// loadTLSFlags reads the certificates that flags name. Its error names the flag.
func loadTLSFlags(t *tlsFiles) error {
	option, err := t.load()
	if option == "certificate" {
		option = "cert"
	}
	if err != nil {
		return usagef("-%s: %w", option, err)
	}
	return nil
}

func runCall(ctx context.Context, in invocation) error {
	flags := flag.NewFlagSet("call", flag.ContinueOnError)
	files := tlsFlags(flags)
	if err := in.parse(flags, in.args); err != nil {
		return err
	}
	if len(in.args) < 2 {
		return in.usageError()
	}
	u, err := httpURL(in.args[0])
	if err != nil {
		return &exitError{exitUsage, err}
	}
	if err := loadTLSFlags(files); err != nil {
		return err
	}
	var params []any
	for _, arg := range in.args[2:] {
		params = append(params, wireValue(arg))
	}
	c := newClient(u, time.Minute, clientTLS(*files))
	defer c.close()
	v, err := c.call(ctx, in.args[1], params...)
	if f := (*fault)(nil); err != nil && !errors.As(err, &f) {
		err = fmt.Errorf("call %s: %w", u.Redacted(), err)
	}
	if err == nil {
		fmt.Fprintln(in.out, readable(v))
	}
	return err
}

// wireValue returns an argument of the command line as a value: a whole number
// as int, or as i8 where an int is too small, anything else as a string.
func wireValue(arg string) any {
	n, err := strconv.ParseInt(arg, 10, 64)
	switch {
	case err != nil:
		return arg
	case n != int64(int32(n)):
		return n
	}
	return int(n)
}

// readable returns a value for people: one line for each element or member.
func readable(v any) string {
	var lines []string
	switch v := v.(type) {
	case nil:
		return "nil"
	case []byte:
		return base64.StdEncoding.EncodeToString(v)
	case []any:
		for _, e := range v {
			lines = append(lines, "- "+strings.ReplaceAll(readable(e), "\n", "\n  "))
		}
	case map[string]any:
		for _, name := range sortedKeys(v) {
			text := " " + readable(v[name])
			if strings.Contains(text, "\n") {
				text = strings.ReplaceAll("\n"+text[1:], "\n", "\n  ")
			}
			lines = append(lines, name+":"+text)
		}
	default:
		return fmt.Sprint(v)
	}
	return strings.Join(lines, "\n")
}

func runMonitor(ctx context.Context, in invocation) error {
	flags := flag.NewFlagSet("monitor", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:8081", "")
	m := &monitor{}
	flags.StringVar(&m.packages, "packages", "", "")
	flags.StringVar(&m.next, "next", "", "")
	files := tlsFlags(flags)
	if err := in.parse(flags, in.args); err != nil {
		return err
	}
	if len(in.args) > 0 {
		return usagef("monitor takes no argument %q", in.args[0])
	}
	if _, err := httpURL(m.next); m.next != "" && err != nil {
		return usagef("-next: %w", err)
	}
	if _, err := os.ReadDir(m.packages); m.packages != "" && err != nil {
		return usagef("-packages: %w", err)
	}
	if err := loadTLSFlags(files); err != nil {
		return err
	}
	scheme := "http"
	if m.tls = serverTLS(*files); m.tls != nil {
		scheme = "https"
	}
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		return fmt.Errorf("-listen: %w", err)
	}
	log.Printf("monitor on %s://%s/xmlrpc/", scheme, listener.Addr())
	m.stored = func(r storedReading) error {
		_, err := fmt.Fprintln(in.out, r)
		return err
	}
	return m.serve(ctx, listener)
}

// A storedReading is a reading that the stand-in monitor received.
type storedReading struct {
	time   dateTime
	peer   string
	ticket any
	code   int
	value  string
}

func (r storedReading) String() string {
	return fmt.Sprintf("%s %s %s: exit %d, value %s", r.time, r.peer, ticketText(r.ticket), r.code, oneLine(r.value))
}

// A monitor stands in for the real one, in labs and tests.
type monitor struct {
	packages string                    // the directory that holds SENSOR.tar.bz2; "" serves none
	next     string                    // the URL that agents move to; "" is none
	stored   func(storedReading) error // is called for each reading, one at a time
	tls      *tls.Config               // nil: without TLS

	mu sync.Mutex // guards the calls of stored
}

// serve answers agents until ctx ends.
func (m *monitor) serve(ctx context.Context, listener net.Listener) error {
	h := newHandler(m.methods())
	if m.tls != nil {
		h.setAccess(&access{tls: m.tls})
	}
	stop := context.AfterFunc(ctx, func() { h.http.Close() })
	defer stop()
	if err := h.serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func (m *monitor) methods() []method {
	return []method{
		{"cmd_store_probe_data", "string int array dateTime.iso8601",
			"Takes a reading: ticket, [exit code, value], time.", m.store},
		{"cmd_get_sensor_code", "base64 string", "The package of a sensor.", m.sensorCode},
		{"cmd_get_sensor_signature", "base64 string", "The signature of a sensor's package.", m.sensorSignature},
		{"cmd_get_new_monitor_url", "string string", "The URL of the monitor that a host moves to.", m.nextURL},
		{"healthcheck", "string", "OK.", healthcheck},
	}
}

func (m *monitor) store(r request, params []any) (any, error) {
	reading, ok := decodeStored(r.peer, params)
	if !ok {
		return nil, faultf(faultParams,
			"cmd_store_probe_data takes ticket, [exit code as int, value as string], time as dateTime.iso8601")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return "OK", m.stored(reading)
}

// decodeStored returns the reading that the parameters of cmd_store_probe_data
// stand for, and whether they do.
func decodeStored(peer string, params []any) (r storedReading, ok bool) {
	r.peer = peer
	if len(params) != 3 {
		return r, false
	}
	var err error
	r.ticket, err = ticketOf(params[0])
	pair, isArray := params[1].([]any)
	at, isTime := params[2].(dateTime)
	if err != nil || !isArray || !isTime || len(pair) != 2 {
		return r, false
	}
	code, isInt := pair[0].(int)
	value, isString := pair[1].(string)
	r.time, r.code, r.value = at, code, value
	return r, isInt && isString
}

func (m *monitor) sensorCode(_ request, params []any) (any, error) {
	return m.file(params, ".tar.bz2")
}

func (m *monitor) sensorSignature(_ request, params []any) (any, error) {
	return m.file(params, ".tar.bz2.sig")
}

// file returns the content of the file that a sensor's name and a suffix make.
func (m *monitor) file(params []any, suffix string) (any, error) {
	if len(params) != 1 {
		return nil, faultf(faultParams, "takes the name of a sensor")
	}
	name, err := sensorName(params[0])
	if err == nil && m.packages == "" {
		err = errors.New("this monitor serves no packages")
	}
	var data []byte
	if err == nil {
		data, err = readSmall(filepath.Join(m.packages, name+suffix), maxServed)
	}
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("no %s%s here", name, suffix)
	}
	if err != nil {
		return nil, faultf(faultParams, "%v", err)
	}
	return data, nil
}

func (m *monitor) nextURL(_ request, params []any) (any, error) {
	switch {
	case len(params) != 1:
		return nil, faultf(faultParams, "cmd_get_new_monitor_url takes the host name of the agent")
	case m.next == "":
		return nil, faultf(faultParams, "there is no new monitor")
	}
	return m.next, nil
}

// selfFiles is what the selftest's agent and monitor have: sensors that behave
// and misbehave, and packages of newer versions of two of them.
var selfFiles = map[string]string{
	"client.cfg":               "",
	"sensors/good/check":       "#!/bin/sh\necho 42\n",
	"sensors/failing/check":    "#!/bin/sh\necho no such thing >&2; exit 3\n",
	"sensors/hanging/check":    "#!/bin/sh\nsleep 60\n",
	"sensors/garbage/check":    "#!/bin/sh\necho hello\n",
	"packages/good.tar.bz2":    tarOf("good/check", "#!/bin/sh\necho 43\n"),
	"packages/garbage.tar.bz2": tarOf("garbage/check", "#!/bin/sh\nexit 1\n"),
}

// tarOf returns an archive, not compressed, with one file.
func tarOf(name, content string) string {
	var b strings.Builder
	w := tar.NewWriter(&b) // writing to a Builder cannot fail
	w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content))})
	io.WriteString(w, content)
	w.Close()
	return b.String()
}

// selfCommands lists what the selftest asks of its own sensors, and what must
// come of it.
var selfCommands = []struct {
	command, sensor string
	code            int
	value           string
}{
	{"cmd_submit_reading", "good", 0, "42"},
	{"cmd_submit_reading", "failing", 3, "nan"},
	{"cmd_submit_reading", "hanging", -15, "nan"},
	{"cmd_submit_reading", "garbage", 65, "nan"},
	{"cmd_update_sensor_code", "good", 0, "1"},
	{"cmd_submit_reading", "good", 0, "43"},
	{"cmd_update_sensor_code", "garbage", 1, "nan"}, // a package whose trial fails
	{"cmd_submit_reading", "garbage", 65, "nan"},
	{"cmd_rollback_sensor_code", "good", 0, "1"},
	{"cmd_submit_reading", "good", 0, "42"},
	{"cmd_register_new_server", "", 0, "1"},
	{"cmd_submit_reading", "good", 0, "42"},
}

// A selftest runs agents against a stand-in monitor, all on loopback.
type selftest struct {
	out     io.Writer
	monitor *url.URL
	stored  chan storedReading
	reasons chan string // of the reading that is stored next
	tickets int
	failed  int
}

func runSelftest(ctx context.Context, in invocation) error {
	s, installed := settings{}, true
	file, err := findConfig(in.config)
	if err == nil {
		s, err = readSettings(file)
	} else if in.config == "" {
		installed = false
		s, _, err = (&ini{}).settings("")
	}
	if err != nil {
		return err
	}
	dir, err := selfDir(s)
	if err != nil {
		return fmt.Errorf("selftest: no directory to run a shell script in: %w", err)
	}
	defer os.RemoveAll(dir)
	var lines bytes.Buffer // of the log, shown only where something failed
	before := log.Writer()
	log.SetOutput(plainLog{&lines})
	fmt.Fprintf(in.out, "picket %s in %s\n", version(), dir)
	t := &selftest{out: in.out, stored: make(chan storedReading, 1), reasons: make(chan string, 1)}
	if err = t.run(ctx, dir, s, installed); err == nil && t.failed > 0 {
		err = fmt.Errorf("%s not as it should be", plural(t.failed, "thing"))
	}
	log.SetOutput(before)
	if err != nil {
		fmt.Fprintf(in.out, "\nlog:\n%s", indent(strings.TrimSpace(lines.String()), "  "))
		return fmt.Errorf("selftest: %w", err)
	}
	fmt.Fprintln(in.out, "selftest passed")
	return nil
}

// selfDir makes a directory with selfFiles in which scripts can be run: a box
// may have /tmp mounted noexec, or none.
func selfDir(s settings) (string, error) {
	var errs []error
	for _, parent := range []string{os.TempDir(), "/var/tmp", "/dev/shm", filepath.Dir(s.path), "."} {
		dir, err := os.MkdirTemp(parent, "picket-selftest-")
		if err == nil {
			dir, err = filepath.Abs(dir)
		}
		if err == nil {
			if err = makeFiles(dir, selfFiles); err == nil {
				r := activate(selfSettings(s, dir, time.Minute)).sensors.read(context.Background(), "good", nil, nil)
				if r.code == 0 {
					return dir, nil
				}
				err = fmt.Errorf("%s: exit %d: %s", dir, r.code, r.reason)
			}
			os.RemoveAll(dir)
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

// makeFiles makes files, by their paths in dir, that every user can run
// whatever the umask.
func makeFiles(dir string, files map[string]string) error {
	for name, content := range files {
		file := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(file), 0o755)
		if err == nil {
			err = os.WriteFile(file, []byte(content), 0o755)
		}
		for at := file; err == nil && len(at) >= len(dir); at = filepath.Dir(at) {
			err = os.Chmod(at, 0o755)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// selfSettings returns s with the paths of the selftest's own sensors.
func selfSettings(s settings, dir string, timeout time.Duration) settings {
	s.file, s.path = filepath.Join(dir, "client.cfg"), filepath.Join(dir, "sensors")
	s.backup = filepath.Join(dir, "backup")
	s.executable, s.help, s.timeout, s.update, s.publicKey = "check", "options", timeout, true, ""
	return s
}

// run runs a stand-in for the monitor, and against it an agent with the sensors
// in dir and, where sensors are installed, one with those.
func (t *selftest) run(ctx context.Context, dir string, s settings, installed bool) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	t.monitor = &url.URL{Scheme: "http", Host: listener.Addr().String(), Path: "/xmlrpc/"}
	m := &monitor{
		packages: filepath.Join(dir, "packages"),
		next:     t.monitor.JoinPath("../RPC2").String(), // the same monitor by another URL
		stored:   func(r storedReading) error { t.stored <- r; return nil },
	}
	monitored, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.serve(monitored, listener) }()
	fmt.Fprintf(t.out, "%-12s %-16s %4s  %s\n", "sensor", "arguments", "exit", "value")
	err = t.withAgent(ctx, selfSettings(s, dir, time.Second), t.testOwn)
	if err == nil && installed {
		if text := noSensors(activate(s).sensors); text != "" {
			fmt.Fprintln(t.out, text)
		}
		err = t.withAgent(ctx, s, t.testInstalled)
	}
	cancel()
	return errors.Join(err, <-ended)
}

// testOwn does with the selftest's own sensors all that a monitor can ask.
func (t *selftest) testOwn(ctx context.Context, c *client) error {
	for _, step := range selfCommands {
		got, _, err := t.command(ctx, c, step.command, step.sensor, nil)
		if err != nil {
			return err
		}
		remark := "as it should be"
		if got.code != step.code || got.value != step.value {
			remark = fmt.Sprintf("FAILED: should be exit %d, value %s", step.code, step.value)
			t.failed++
		}
		if step.command == "cmd_submit_reading" {
			t.print(step.sensor, "", got, remark)
		} else {
			t.print(strings.Split(step.command, "_")[1], step.sensor, got, remark)
		}
	}
	return nil
}

// testInstalled takes a reading from every sensor of the configured directory:
// the first thing that its help says it can be asked.
func (t *selftest) testInstalled(ctx context.Context, c *client) error {
	v, err := c.call(ctx, "cmd_list_sensors")
	if err != nil {
		return fmt.Errorf("cmd_list_sensors: %w", err)
	}
	texts, _ := v.(map[string]any)
	for _, name := range sortedKeys(texts) {
		help := fmt.Sprint(texts[name])
		if strings.HasPrefix(help, noHelp) {
			fmt.Fprintf(t.out, "%-12s FAILED: %s\n", name, help)
			t.failed++
			continue
		}
		args := firstOption(help)
		got, reason, err := t.command(ctx, c, "cmd_submit_reading", name, args)
		if err != nil {
			return err
		}
		remark, agentsOwn := "", []int{codeNoNumber, codeNotStarted, codeNotFound}
		switch {
		case got.code > 0 && reason != "" && !slices.Contains(agentsOwn, got.code):
			remark = "not counted: " + reason // the sensor says why the box has no such thing
		case got.code != 0:
			remark = "FAILED: " + reason
			t.failed++
		}
		t.print(name, strings.Trim(fmt.Sprint(args), "[]"), got, remark)
	}
	return nil
}

// firstOption returns the arguments that ask a sensor for the first thing in
// its help.
func firstOption(help string) []any {
	line, _, _ := strings.Cut(help, "\n")
	args := []any{}
	for i, word := range strings.Fields(line) {
		switch {
		case word == "<vol>":
			word = "/"
		case word == "<if>":
			word = "lo"
		case i > 0:
			return args
		}
		args = append(args, word)
	}
	return args
}

func (t *selftest) print(name, args string, got storedReading, remark string) {
	line := fmt.Sprintf("%-12s %-16s %4d  %-12s %s", name, args, got.code, got.value, remark)
	fmt.Fprintln(t.out, strings.TrimSpace(line))
}

// withAgent calls test while an agent with these settings runs; its address,
// its monitor and its log are the selftest's own.
func (t *selftest) withAgent(ctx context.Context, s settings, test func(context.Context, *client) error) error {
	s.listen, s.monitor, s.noValue, s.spool = "127.0.0.1:0", t.monitor, "nan", ""
	s.allow, s.agentTLS, s.monitorTLS = nil, tlsFiles{}, tlsFiles{}
	a, err := newAgent(s)
	if err != nil {
		return err
	}
	a.queue.deliver = func(ticket any, r reading) {
		t.reasons <- r.reason
		a.delivery.put(ticket, r)
	}
	u := &url.URL{Scheme: "http", Host: a.listener.Addr().String(), Path: "/xmlrpc"}
	c := newClient(u, time.Minute+s.timeout, nil)
	defer c.close()
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- a.run(ctx) }()
	err = test(ctx, c)
	cancel()
	return errors.Join(err, <-ended)
}

// command gives the agent a command, waits for its reading at the monitor and
// returns that, and the reason that the agent has for it.
func (t *selftest) command(ctx context.Context, c *client, command, sensor string, args []any) (
	got storedReading, reason string, err error) {
	t.tickets++
	params := []any{t.tickets, sensor, args}
	switch command {
	case "cmd_register_new_server":
		params = []any{t.tickets}
	case "cmd_update_sensor_code", "cmd_rollback_sensor_code":
		params = []any{sensor, t.tickets}
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	if _, err = c.call(ctx, command, params...); err == nil {
		select {
		case got = <-t.stored:
			if got.ticket == any(t.tickets) {
				return got, <-t.reasons, nil
			}
			err = fmt.Errorf("the monitor got %v for ticket %d", got, t.tickets)
		case <-ctx.Done():
			err = fmt.Errorf("nothing has arrived at the monitor: %w", ctx.Err())
		}
	}
	return got, "", fmt.Errorf("%s %s: %w", command, sensor, err)
}
