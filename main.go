// Picket is a monitoring agent in one static binary, for machines too small,
// too old or too odd for anything else.
//
// It is passive: the monitor sends a command over XML-RPC, with a ticket. The
// agent acknowledges it at once, does the work (runs a sensor: any program
// that prints one number) and hands in the reading, with the same ticket, over a
// connection that it opens itself to the one monitor named in client.cfg.
// Whoever merely asks gets an acknowledgement and no data.
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
// else; only its monitor can change them, or with [sensor] public_key whoever
// has the secret key. A command only chooses among them and gives them
// arguments, which no shell ever sees. What it measured goes to the monitor of
// client.cfg or nowhere. Who can reach its port, and is let in by [agent] allow
// and client_ca, can have sensors run, at most [sensor] concurrency at once, but
// not see what they print.
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
// used by main alone, and what it knows of replacing a file by all.
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
	acceptTime   = 10 * time.Second // that a command waits for room in the queue
	sensorsTime  = 5 * time.Second  // that running sensors get when the agent ends
	deliverTime  = 5 * time.Second  // that undelivered readings get then
	maxTicket    = 1 << 10          // bytes of a ticket that is a string: 1,024 undelivered ones are 1 MiB
	maxPackage   = 4 << 20          // bytes of a package that the stand-in monitor serves
	spareThreads = 8                // beside those that run Go code: for files, names, signals
	initTime     = 30 * time.Second // that an agent which init started waits before it ends with an error
)

// Exit codes of the process.
const (
	exitFailed = 1
	exitUsage  = 2 // or configuration
)

// What the linker writes into the binary; "" where only the toolchain's own stamp
// tells.
var (
	release string // as git describes it
	built   string // the time of the source, in seconds since 1970
)

func main() {
	growStack()
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGUSR1) // before anything else: an init may be quick
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, func() { signal.Reset(syscall.SIGINT) }) // a second one ends the process at once
	log.SetFlags(0)
	log.SetOutput(plainLog{os.Stderr})
	out := &output{w: os.Stdout}
	err := execute(ctx, signals, os.Args[1:], out)
	if err == nil {
		err = out.err
	}
	var coded *exitError
	switch {
	case errors.As(err, &coded):
		if coded.err != nil {
			log.Print(coded.err)
		}
		os.Exit(coded.code)
	case err != nil:
		log.Print(err)
		os.Exit(exitFailed)
	}
}

// growStack has the stack of a goroutine grow while there is little on it. To move
// a deep one the runtime looks up each function in tables of the binary, 64 KiB of
// which come into memory each time: of an idle agent that was a tenth.
//
//go:noinline
func growStack() byte {
	var room [12 << 10]byte
	return room[len(os.Args)%len(room)]
}

// An output remembers that it could not be written.
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

// An invocation is one call of the program.
type invocation struct {
	config  string // -c
	signals <-chan os.Signal
	args    []string
	out     io.Writer
}

// A subcommand is a word on the command line.
type subcommand struct {
	name, args, help string
	run              func(context.Context, invocation) error
}

func subcommands() []subcommand {
	return []subcommand{
		{"", "", "run the agent until SIGTERM or SIGINT", runUnderInit},
		{"check", "SENSOR [ARG...]", "run one sensor as the agent would", runCheck},
		{"list", "", "the sensors, what they can be asked", runList},
		{"config", "", "check client.cfg, print every option", runConfig},
		{"config get", "SECTION OPTION", "print one value", nil},
		{"config set", "SECTION OPTION VALUE [SECTION OPTION VALUE...]", "change values in place", nil},
		{"config unset", "SECTION [OPTION]", "remove an option or a section", nil},
		{"update", "SENSOR", "fetch a package and install it", runUpdate},
		{"rollback", "SENSOR", "put the newest backup back in place", runRollback},
		{"install", "FILE.tar.bz2", "install a package that lies here", runInstall},
		{"call", "[-ca FILE] [-cert FILE -key FILE] URL METHOD [ARG...]", "call an XML-RPC method", runCall},
		{"monitor", "[-listen ADDRESS] [-packages DIR] [-next URL]\n    [-cert FILE -key FILE [-ca FILE]]", "a stand-in that prints readings", runMonitor},
		{"selftest", "", "prove that all works on this box", runSelftest},
		{"version", "", "version, commit, Go, architecture", runVersion},
		{"help", "", "this page", runHelp},
	}
}

// execute runs the program with the arguments of its command line.
func execute(ctx context.Context, signals <-chan os.Signal, args []string, out io.Writer) error {
	flags := newFlags("picket")
	config := flags.String("c", "", "")
	if err := flags.Parse(args); err != nil {
		return flagError(err, out)
	}
	in := invocation{config: *config, signals: signals, out: out}
	name := ""
	if rest := flags.Args(); len(rest) > 0 {
		name, in.args = rest[0], rest[1:]
		signal.Reset(syscall.SIGHUP, syscall.SIGUSR1) // which mean something to an agent only
	}
	for _, c := range subcommands() {
		if c.name == name && c.run != nil {
			err := c.run(ctx, in)
			var coded *exitError
			switch {
			case errors.As(err, &coded) && coded.err != nil:
				return &exitError{coded.code, maskedError{err}}
			case err != nil && coded == nil:
				return maskedError{err}
			}
			return err
		}
	}
	return usagef("unknown command %q; see picket help", name)
}

// newFlags returns a set of flags that leaves all printing to execute.
func newFlags(name string) *flag.FlagSet {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	return flags
}

func flagError(err error, out io.Writer) error {
	if errors.Is(err, flag.ErrHelp) {
		return runHelp(context.Background(), invocation{out: out})
	}
	return usagef("%v; see picket help", err)
}

// takes checks the number of arguments.
func (in invocation) takes(least, most int, usage string) error {
	if n := len(in.args); n < least || n > most {
		return usagef("usage: picket %s", usage)
	}
	return nil
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
	if err := in.takes(0, 0, "version"); err != nil {
		return err
	}
	fmt.Fprintln(in.out, "picket", version())
	return nil
}

// version describes the binary by what the Go toolchain wrote into it.
func version() string {
	name, commit, arch := "(devel)", "", runtime.GOARCH
	if info, ok := debug.ReadBuildInfo(); ok {
		if info.Main.Version != "" {
			name = info.Main.Version
		}
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				commit = " commit " + s.Value
			case "vcs.modified":
				if s.Value == "true" {
					commit += "+changes"
				}
			case "GOARM", "GO386", "GOMIPS", "GOMIPS64":
				arch += "," + s.Value
			}
		}
	}
	if release != "" {
		name, commit = release, ""
	}
	return fmt.Sprintf("%s%s %s %s/%s", name, commit, runtime.Version(), runtime.GOOS, arch)
}

// findConfig returns the path of client.cfg: the one that was named, else the
// one in the working directory, else the one beside the program.
func findConfig(named string) (string, error) {
	if named != "" {
		if _, err := os.Stat(named); err != nil {
			return "", &exitError{exitUsage, err}
		}
		return filepath.Abs(named)
	}
	var tried []string
	for _, dir := range []func() (string, error){os.Getwd, programDir} {
		where, err := dir()
		if err != nil {
			continue
		}
		file := filepath.Join(where, "client.cfg")
		if _, err := os.Lstat(file); err == nil {
			return file, nil
		}
		if !slices.Contains(tried, file) {
			tried = append(tried, file)
		}
	}
	return "", usagef("no client.cfg: looked for %s; -c names another", strings.Join(tried, ", then "))
}

// programDir is the directory of the program itself, links followed.
func programDir() (string, error) {
	file, err := os.Executable()
	if err != nil {
		return "", err
	}
	file, err = filepath.EvalSymlinks(file)
	return filepath.Dir(file), err
}

// loadSettings finds client.cfg and reads the settings.
func loadSettings(named string) (settings, error) {
	file, err := findConfig(named)
	if err != nil {
		return settings{}, err
	}
	_, s, err := readSettings(file)
	return s, err
}

// readSettings reads the settings of a file and the text they come from, and
// logs what the file warns of.
func readSettings(file string) (*ini, settings, error) {
	c, err := readINI(file)
	if err != nil {
		return nil, settings{}, &exitError{exitUsage, err}
	}
	s, warnings, err := c.settings(filepath.Dir(file))
	for _, w := range warnings {
		log.Print(warning + w)
	}
	if err != nil {
		return nil, settings{}, &exitError{exitUsage, err}
	}
	s.file = file
	return c, s, nil
}

// runUnderInit runs the agent. An init that respawns it would do that without end
// and without pause where, say, client.cfg is wrong: so, started by process 1, it
// waits before it ends with an error, 30 s or until a signal comes.
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
	// Noted and dropped: the end of whoever reads the log is not the agent's, nor
	// is a file that may not grow. Ignored, they would be so in sensors, too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE, syscall.SIGXFSZ)
	logs := newLogWriter(os.Stderr)
	log.SetOutput(logs)
	defer logs.close()
	s, err := loadSettings(in.config)
	if err != nil {
		return err
	}
	logs.useSyslog(s.syslog)
	a, err := newAgent(s)
	if err != nil {
		return err
	}
	a.signals, a.applied = in.signals, func(s settings) { logs.useSyslog(s.syslog); limitMemory(s) }
	reserveThreads(runtime.GOMAXPROCS(0) + spareThreads)
	a.settle(ctx)
	defer time.AfterFunc(time.Second, func() { limitMemory(a.setup.Load().settings) }).Stop() // it stops the program for a moment
	return a.run(ctx)
}

// limitMemory has the garbage collector keep the agent small, which costs little
// as little is alive: it collects when the heap has grown by a quarter, and harder
// from 12 MiB on, and what a full queue and a full spool take. GOGC and
// GOMEMLIMIT in the environment have precedence.
func limitMemory(s settings) {
	limit := int64(12<<20) + int64(s.queue)<<10
	if s.spool != "" {
		limit += 6 * s.spoolSize
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(25)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(limit)
	}
}

// splitSeverity takes the severity off the front of a line of the log: 3 is an
// error, 6 information.
func splitSeverity(line string) (severity int, text string) {
	for _, mark := range []string{severe, warning, notice} {
		if rest, ok := strings.CutPrefix(line, mark); ok {
			return int(mark[1] - '0'), rest
		}
	}
	return 6, line
}

// A plainLog writes lines of the log as people read them.
type plainLog struct{ w io.Writer }

func (p plainLog) Write(line []byte) (int, error) {
	_, text := splitSeverity(string(line))
	_, err := io.WriteString(p.w, "picket: "+text)
	return len(line), err
}

const (
	logLines    = 256              // that wait to be written
	repeatTime  = 10 * time.Second // before a line that was repeated is summed up
	lastLogTime = time.Second      // to write what waits when the agent ends
	syslogTime  = time.Second      // for syslog to take a line, else it counts as absent for 10 s
)

// A logWriter writes the log to standard error or, while there is one, to the
// local syslog. Whoever logs does not wait for either: where neither takes the
// lines, 256 wait, more are counted and lost. A line that is the same as the one
// before is counted, and that logged in its place.
type logWriter struct {
	stderr io.Writer
	dial   func() (net.Conn, error) // to syslog
	lines  chan string
	lost   atomic.Int64
	syslog atomic.Bool // wanted
	done   chan struct{}

	// What run alone uses.
	conn    net.Conn // to syslog
	absent  bool     // it is
	retryAt time.Time
	before  string // the line before
	again   int    // times that it came again
}

func newLogWriter(stderr io.Writer) *logWriter {
	w := &logWriter{
		stderr: stderr, lines: make(chan string, logLines), done: make(chan struct{}),
		dial: func() (net.Conn, error) { return dialSyslog("/dev/log", "/var/run/syslog", "/var/run/log") },
	}
	go w.run()
	return w
}

func (w *logWriter) useSyslog(wanted bool) { w.syslog.Store(wanted) }

func (w *logWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- string(line):
	default:
		w.lost.Add(1)
	}
	return len(line), nil
}

// close writes what waits, if that is possible at once, and has the log written
// straight to standard error from then on.
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
	defer w.hangUp()
	var repeated <-chan time.Time // when it is time to sum up
	for {
		select {
		case line, more := <-w.lines:
			if n := w.lost.Swap(0); n > 0 {
				w.sumUp()
				w.print(fmt.Sprintf(warning+"%s of the log lost: nobody took them\n", plural(int(n), "line")))
			}
			switch {
			case !more:
				w.sumUp()
				return
			case line == w.before:
				if w.again++; repeated == nil {
					repeated = time.After(repeatTime)
				}
			default:
				w.sumUp()
				w.print(line)
				w.before = line
			}
		case <-repeated:
			w.sumUp()
			repeated = nil
		}
	}
}

func (w *logWriter) sumUp() {
	if w.again > 0 {
		w.print(fmt.Sprintf("the line before %s more\n", plural(w.again, "time")))
	}
	w.again = 0
}

// print writes a line where the log goes.
func (w *logWriter) print(line string) {
	if w.syslog.Load() {
		err := w.toSyslog(line)
		if err == nil {
			w.absent = false
			return
		}
		if !w.absent {
			w.absent = true
			plainLog{w.stderr}.Write([]byte(fmt.Sprintf("log to syslog: %v; standard error instead\n", err)))
		}
	} else {
		w.absent = false
	}
	plainLog{w.stderr}.Write([]byte(line))
}

// toSyslog hands a line to syslog, in the format of RFC 3164, facility daemon.
// It does not wait for long: the log/syslog package would.
func (w *logWriter) toSyslog(line string) (err error) {
	if w.conn == nil && time.Now().Before(w.retryAt) {
		return os.ErrDeadlineExceeded
	}
	if w.conn == nil {
		if w.conn, err = w.dial(); err != nil {
			return err
		}
	}
	severity, text := splitSeverity(line)
	w.conn.SetWriteDeadline(time.Now().Add(syslogTime))
	for _, part := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		_, err := fmt.Fprintf(w.conn, "<%d>%s picket[%d]: %s\n", 3<<3|severity, time.Now().Format(time.Stamp), os.Getpid(), part)
		if err != nil {
			w.hangUp()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				w.retryAt = time.Now().Add(repeatTime)
			}
			return err
		}
	}
	return nil
}

func (w *logWriter) hangUp() {
	if w.conn != nil {
		w.conn.Close()
		w.conn = nil
	}
}

// dialSyslog connects to the first of these sockets that somebody listens on.
func dialSyslog(paths ...string) (c net.Conn, err error) {
	for _, path := range paths {
		for _, network := range []string{"unixgram", "unix"} {
			var err2 error
			if c, err2 = net.Dial(network, path); err2 == nil {
				return c, nil
			}
			if err == nil {
				err = err2
			}
		}
	}
	return nil, err
}

// A setup is what the settings that are in force come to.
type setup struct {
	settings settings
	sensors  *sensors
	updater  *updater
}

// An agent answers commands and hands in readings.
type agent struct {
	setup    atomic.Pointer[setup]
	handler  *handler
	delivery *delivery
	queue    *queue
	events   logLimit // commands and runs: a busy monitor must not fill a log
	started  time.Time
	signals  <-chan os.Signal // SIGHUP and SIGUSR1
	applied  func(settings)   // is told of new settings

	ctx    context.Context // of what is asked and has no place in the queue
	cancel context.CancelFunc

	changing sync.Mutex // is held while client.cfg is read again, or written
	listener net.Listener
	served   chan error // why a listener is served no more
}

// newAgent returns an agent that listens but does not answer yet: run does.
func newAgent(s settings) (*agent, error) {
	listener, err := net.Listen("tcp", s.listen)
	if err != nil {
		return nil, fmt.Errorf("[agent] listen: %w", err)
	}
	a := &agent{listener: listener, events: logLimit{burst: 1000, perSecond: 10}, started: time.Now(), served: make(chan error, 1), applied: func(settings) {}}
	sensors := installedSensors(s)
	a.setup.Store(&setup{s, sensors, updaterOf(s, sensors)})
	a.handler = newHandler(a.commands())
	a.handler.setAccess(accessOf(s))
	a.delivery = newDelivery(monitorOf(s), zoneFor(s), s.noValue, time.Second, spoolOf(s))
	a.queue = newQueue(s.concurrency, s.queue, a.perform, a.delivery.put, a.delivery.discard)
	a.ctx, a.cancel = context.WithCancel(context.Background())
	return a, nil
}

// installedSensors are the sensors as the settings have them run.
func installedSensors(s settings) *sensors {
	return newSensors(s.path, s.executable, s.help, s.timeout, s.user)
}

func updaterOf(s settings, sensors *sensors) *updater {
	return newUpdater(sensors, s.backup, s.publicKey, s.maxPackage, s.maxUnpacked, s.keep)
}

func zoneFor(s settings) *time.Location {
	if s.utc {
		return time.UTC
	}
	return localZone()
}

func spoolOf(s settings) *spool {
	if s.spool == "" {
		return nil
	}
	return newSpool(s.spool, s.spoolSize)
}

// buildTime is when the program was built or, by the toolchain's stamp, when
// its source was committed; zero where nobody knows.
func buildTime() time.Time {
	if n, err := strconv.ParseInt(built, 10, 64); err == nil {
		return time.Unix(n, 0)
	}
	t := time.Time{}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.time" {
				t, _ = time.Parse(time.RFC3339, s.Value)
			}
		}
	}
	return t
}

// monitorOf is the client of the monitor that the settings name.
func monitorOf(s settings) *client {
	return newClient(s.monitor, s.monitorTimeout, clientTLS(s.monitorTLS))
}

// clientTLS are the rules for calls over https.
func clientTLS(t tlsFiles) *tls.Config {
	c := newTLS(buildTime())
	c.RootCAs = t.pool
	if t.pair != nil {
		c.Certificates = []tls.Certificate{*t.pair}
	}
	return c
}

// accessOf is who may call the agent, and how.
func accessOf(s settings) *access { return &access{s.allow, serverTLS(s.agentTLS)} }

// serverTLS are the rules for being called over TLS; nil is without.
func serverTLS(t tlsFiles) *tls.Config {
	if t.pair == nil {
		return nil
	}
	c := newTLS(buildTime())
	c.Certificates = []tls.Certificate{*t.pair}
	if t.pool != nil {
		c.ClientCAs, c.ClientAuth = t.pool, tls.RequireAndVerifyClientCert
		c.VerifyConnection = func(state tls.ConnectionState) error { // unlike VerifyPeerCertificate also of a session that is resumed
			if t.name != "" && !bearsName(state.PeerCertificates[0], t.name) {
				return fmt.Errorf("the certificate of %s is not of %s", cut(state.PeerCertificates[0].Subject.String()), cut(t.name))
			}
			return nil
		}
	}
	return c
}

// settle finishes or undoes what a power cut interrupted. The agent runs all
// the same where it can't, as on a read-only file system.
func (a *agent) settle(ctx context.Context) {
	now := a.setup.Load()
	if err := now.updater.recover(ctx); err != nil {
		log.Printf(warning+"recover sensors: %v", err)
	}
	if err := editINI(now.settings.file, nil, func(*ini) error { return nil }); err != nil {
		log.Printf(warning+"recover %s: %v", now.settings.file, err)
	}
}

// run answers commands until ctx ends. Then it takes no more, gives running
// sensors five seconds and undelivered readings another five, and leaves no
// goroutine and no process behind.
func (a *agent) run(ctx context.Context) error {
	s := a.setup.Load().settings
	log.Printf(notice+"%s on %s, sensors in %s, monitor %s", version(), a.listener.Addr(), s.path, s.monitor.Redacted())
	if os.Getpid() == 1 {
		go a.setup.Load().sensors.reapOrphans(ctx)
	}
	a.advise()
	a.listen(a.listener)
	err := a.await(ctx)
	a.delivery.putLast()
	within(sensorsTime, a.queue.close)
	a.cancel()
	a.setup.Load().sensors.awaitListing()
	within(time.Second, func(ctx context.Context) {
		if a.handler.http.Shutdown(ctx) != nil {
			a.handler.http.Close()
		}
	})
	within(deliverTime, a.delivery.close)
	return err
}

// advise logs what is allowed, but perhaps not meant.
func (a *agent) advise() {
	now := a.setup.Load()
	if warns := noSensors(now.sensors); warns != "" {
		log.Print(warning + warns)
	}
	if _, err := os.Stat(filepath.Join(now.settings.path, ownSensor)); err == nil {
		log.Printf(warning+"sensor %s: its directory is not used: the agent itself answers to that name", ownSensor)
	}
	if len(now.settings.allow) == 0 && now.settings.agentTLS.ca == "" {
		log.Printf(notice+"[agent] allow is empty: whoever reaches %s can command the agent", a.listener.Addr())
	}
}

// await does what signals ask until ctx or the serving ends.
func (a *agent) await(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			log.Print(notice + "ending")
			return nil
		case err := <-a.served:
			return err
		case s := <-a.signals:
			switch s {
			case syscall.SIGHUP:
				a.reload()
			case syscall.SIGUSR1:
				log.Print(notice + a.healthLine())
			}
		}
	}
}

// listen serves a listener until it is closed.
func (a *agent) listen(l net.Listener) {
	go func() {
		growStack()
		if err := a.handler.serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			a.served <- fmt.Errorf("serve %s: %w", l.Addr(), err)
		}
	}()
}

// reload reads client.cfg again. What is valid is in force from then on, as a
// whole; else everything stays as it was. Commands that wait, sensors that run
// and undelivered readings are not touched.
func (a *agent) reload() {
	a.changing.Lock()
	defer a.changing.Unlock()
	before := a.setup.Load()
	_, s, err := readSettings(before.settings.file)
	if err == nil && s.listen != before.settings.listen {
		err = a.relisten(before.settings.listen, s.listen)
	}
	if err != nil {
		for _, line := range strings.Split(maskedError{err}.Error(), "\n") {
			log.Printf(severe+"reload: %s", line)
		}
		log.Print(severe + "reload: the settings before stay in force")
		return
	}
	sensors := installedSensors(s)
	sensors.runState = before.sensors.runState
	a.setup.Store(&setup{s, sensors, updaterOf(s, sensors)})
	a.queue.resize(s.concurrency, s.queue)
	access := accessOf(s)
	if s.agentTLS.equal(before.settings.agentTLS) { // so that connections may stay
		access.tls = a.handler.rules().tls
	}
	a.handler.setAccess(access)
	a.delivery.configure(monitorOf(s), zoneFor(s), s.noValue)
	if s.spool != before.settings.spool || s.spoolSize != before.settings.spoolSize {
		a.delivery.useSpool(spoolOf(s))
	}
	a.applied(s)
	log.Printf(notice+"reload: %s is in force; on %s, monitor %s", s.file, a.listener.Addr(), s.monitor.Redacted())
	a.advise()
}

// relisten takes commands at another address. Where the old one is in its way,
// it is left for a moment.
func (a *agent) relisten(before, address string) error {
	l, err := net.Listen("tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		a.listener.Close()
		if l, err = net.Listen("tcp", address); err != nil {
			var back error
			if l, back = net.Listen("tcp", before); back != nil {
				select {
				case a.served <- fmt.Errorf("listen: %w", errors.Join(err, back)):
				default: // there is a reason to end already
				}
				return err
			}
			a.listener = l
			a.listen(l)
			return fmt.Errorf("[agent] listen: %w", err)
		}
	}
	if err != nil {
		return fmt.Errorf("[agent] listen: %w", err)
	}
	a.listener.Close()
	a.listener = l
	a.listen(l)
	return nil
}

// ownSensor is the name of the sensor that is the agent itself.
const ownSensor = "picket"

// health is what it can be asked.
var health = []struct {
	name, help string
	value      func(*agent) (string, error)
}{
	{"uptime", "seconds since the agent started", func(a *agent) (string, error) { return whole(time.Since(a.started).Seconds()), nil }},
	{"queued", "commands that wait", func(a *agent) (string, error) { return strconv.Itoa(a.queue.count()), nil }},
	{"running", "sensors that run", func(a *agent) (string, error) { return strconv.Itoa(a.setup.Load().sensors.running()), nil }},
	{"undelivered", "readings that the monitor does not have yet", func(a *agent) (string, error) { n, _ := a.delivery.count(); return strconv.Itoa(n), nil }},
	{"delivered", "readings delivered since the start", func(a *agent) (string, error) { _, t := a.delivery.count(); return strconv.Itoa(t.delivered), nil }},
	{"dropped", "readings given up since the start", func(a *agent) (string, error) { _, t := a.delivery.count(); return strconv.Itoa(t.dropped), nil }},
	{"refused", "calls refused since the start", func(a *agent) (string, error) { return strconv.FormatInt(a.handler.count.Load(), 10), nil }},
	{"rss_kb", "resident memory in KiB", func(*agent) (string, error) { return residentKiB() }},
	{"spool_bytes", "size of the spool", func(a *agent) (string, error) {
		_, t := a.delivery.count()
		return strconv.FormatInt(t.spoolBytes, 10), nil
	}},
	{"last_delivery_age", "seconds since the latest delivery", func(a *agent) (string, error) {
		_, t := a.delivery.count()
		if t.latest.IsZero() {
			return "", errors.New("nothing was delivered yet")
		}
		return whole(time.Since(t.latest).Seconds()), nil
	}},
}

func whole(f float64) string { return strconv.FormatFloat(f, 'f', 0, 64) }

// residentKiB is the resident memory of this process.
func residentKiB() (string, error) {
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return "", err
	}
	words := strings.Fields(string(text))
	if len(words) < 2 {
		return "", errors.New("/proc/self/statm is not what it should be")
	}
	pages, err := strconv.Atoi(words[1])
	return strconv.Itoa(pages * (os.Getpagesize() >> 10)), err
}

// ownReading is what the sensor that is the agent itself reads.
func (a *agent) ownReading(args []string) reading {
	r := reading{code: exitUsage, taken: time.Now(), reason: fmt.Sprintf("takes one of its options, not %s", cut(strings.Join(args, " ")))}
	for _, h := range health {
		if len(args) != 1 || args[0] != h.name {
			continue
		}
		value, err := h.value(a)
		if err != nil {
			return reading{code: exitFailed, taken: r.taken, reason: err.Error()}
		}
		return reading{value: value, taken: r.taken}
	}
	return r
}

// ownHelp is its help text.
func ownHelp() string {
	var b strings.Builder
	for _, h := range health {
		fmt.Fprintf(&b, "%-18s %s\n", h.name, h.help)
	}
	return strings.TrimSpace(b.String())
}

// healthLine is all of it on one line.
func (a *agent) healthLine() string {
	line := "health:"
	for _, h := range health {
		value, err := h.value(a)
		if err != nil {
			value = "-"
		}
		line += " " + h.name + " " + value
	}
	return line
}

// noSensors says so where there is nothing to run: not an error, as sensors
// can still be installed, but most often a mistake.
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

// within calls f with a context that ends after d.
func within(d time.Duration, f func(context.Context)) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	f(ctx)
}

// commands is all that the monitor can ask, beside what every XML-RPC server has.
func (a *agent) commands() []method {
	return []method{
		{
			"cmd_submit_reading",
			"string int string, string int string array, string int string string, " +
				"string i8 string, string i8 string array, string i8 string string, " +
				"string string string, string string string array, string string string string",
			"cmd_submit_reading(ticket, sensor, [arguments]): runs a sensor and stores the reading at the monitor with cmd_store_probe_data. Returns OK at once.",
			a.submitReading,
		},
		{
			"cmd_update_sensor_code",
			"string string, string string int, string string string",
			"cmd_update_sensor_code(sensor, [ticket]): fetches the sensor's package with cmd_get_sensor_code, tries it and installs it. Returns OK at once; stores exit code 0 and value 1 when it is done.",
			a.updateSensor,
		},
		{
			"cmd_rollback_sensor_code",
			"string string, string string int, string string string",
			"cmd_rollback_sensor_code(sensor, [ticket]): puts the newest backup of the sensor back in its place. Returns OK at once; stores exit code 0 and value 1 when it is done.",
			a.rollbackSensor,
		},
		{
			"cmd_register_new_server",
			"string, string int, string string",
			"cmd_register_new_server([ticket]): asks for another monitor with cmd_get_new_monitor_url, and moves there if its healthcheck answers OK. Returns OK at once; stores exit code 0 and value 1 when it is done.",
			a.registerServer,
		},
		{"cmd_list_sensors", "struct", "cmd_list_sensors(): the help text of each sensor, by its name.", a.listSensors},
		{"healthcheck", "string", "healthcheck(): OK.", healthcheck},
	}
}

func (a *agent) submitReading(r request, params []any) (any, error) {
	if len(params) < 2 || len(params) > 3 {
		return nil, faultf(faultParams, "cmd_submit_reading takes ticket, sensor, [arguments]; got %d parameters", len(params))
	}
	var c command
	var err error
	if c.ticket, err = ticketOf(params[0]); err == nil {
		c.sensor, err = sensorName(params[1])
	}
	if err == nil && len(params) == 3 {
		c.args, err = arguments(params[2])
	}
	if err != nil {
		return nil, faultf(faultParams, "cmd_submit_reading: %v", err)
	}
	return a.accept(r, "cmd_submit_reading", c)
}

// accept takes a command on, and logs it.
func (a *agent) accept(r request, name string, c command) (any, error) {
	line := fmt.Sprintf("command %s from %s: %s", name, r.peer, ticketText(c.ticket))
	if c.sensor != "" {
		line += ", sensor " + logName(c.sensor)
	}
	a.events.printf("%s", line)
	c.from = neighbours(r.peer)
	if err := a.queue.accept(r.ctx, c, r.received.Add(acceptTime)); err != nil {
		return nil, err
	}
	return "OK", nil
}

func (a *agent) updateSensor(r request, params []any) (any, error) {
	return a.acceptChange(r, "cmd_update_sensor_code", "update", params)
}

func (a *agent) rollbackSensor(r request, params []any) (any, error) {
	return a.acceptChange(r, "cmd_rollback_sensor_code", "rollback", params)
}

func (a *agent) registerServer(r request, params []any) (any, error) {
	return a.acceptChange(r, "cmd_register_new_server", "move", params)
}

// acceptChange takes a command on that changes the agent: of a sensor, or "move".
func (a *agent) acceptChange(r request, name, change string, params []any) (any, error) {
	c := command{change: change}
	rest := params
	if change != "move" {
		if len(params) == 0 {
			return nil, faultf(faultParams, "%s takes sensor, [ticket]", name)
		}
		var err error
		if c.sensor, err = sensorName(params[0]); err != nil {
			return nil, faultf(faultParams, "%s: %v", name, err)
		}
		rest = params[1:]
	}
	if len(rest) > 1 {
		return nil, faultf(faultParams, "%s: %d parameters are too many", name, len(params))
	}
	if len(rest) == 1 && rest[0] != nil {
		var err error
		if c.ticket, err = ticketOf(rest[0]); err != nil {
			return nil, faultf(faultParams, "%s: %v", name, err)
		}
	}
	return a.accept(r, name, c)
}

// ticketOf returns v as a ticket: an int, an i8 or a string of at most 1 KiB.
func ticketOf(v any) (any, error) {
	switch v := v.(type) {
	case int, int64:
		return v, nil
	case string:
		if len(v) > maxTicket {
			return nil, fmt.Errorf("a ticket has at most %d bytes", maxTicket)
		}
		return v, nil
	}
	return nil, fmt.Errorf("a ticket is an int, an i8 or a string, not %s", typeName(v))
}

// perform does what a queued command asks.
func (a *agent) perform(ctx context.Context, c command) reading {
	if c.change == "" {
		return a.read(ctx, c)
	}
	begun := time.Now()
	err := a.alter(ctx, c)
	subject := c.change
	if c.sensor != "" {
		subject += " " + logName(c.sensor)
	}
	if err != nil {
		a.events.printf(warning+"%s: %s", subject, oneLine(err.Error()))
		return reading{code: 1, taken: time.Now(), reason: err.Error()}
	}
	log.Printf(notice+"%s: done in %v", subject, time.Since(begun).Round(time.Millisecond))
	debug.FreeOSMemory() // decompressing took more than all else
	return reading{code: 0, value: "1", taken: time.Now()}
}

// alter changes a sensor, or the monitor that the agent belongs to. An error
// means that nothing has changed.
func (a *agent) alter(ctx context.Context, c command) error {
	now := a.setup.Load()
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

// move makes the monitor that the present one names the only one: in
// client.cfg first, then for every reading that is not delivered yet.
func (a *agent) move(ctx context.Context) error {
	present := a.delivery.monitor()
	u, err := nextMonitor(ctx, present, httpURL)
	if err != nil {
		return err
	}
	a.changing.Lock()
	defer a.changing.Unlock()
	if a.delivery.monitor() != present {
		return errors.New("client.cfg was read again meanwhile")
	}
	now := *a.setup.Load()
	err = editINI(now.settings.file, nil, func(c *ini) error { return c.set("monitor", "url", u.String()) })
	if err != nil {
		return err
	}
	now.settings.monitor = u
	a.setup.Store(&now)
	a.delivery.moveTo(present, newClient(u, now.settings.monitorTimeout, present.tls))
	log.Printf(notice+"move: from now on the monitor is %s", u.Redacted())
	return nil
}

// read runs a queued command.
func (a *agent) read(ctx context.Context, c command) reading {
	a.delivery.waitRoom(ctx)
	begun := time.Now()
	var r reading
	if c.sensor == ownSensor {
		r = a.ownReading(c.args)
	} else {
		r = a.setup.Load().sensors.read(ctx, c.sensor, c.args, nil)
	}
	line := fmt.Sprintf("sensor %s: exit %d in %v", logName(c.sensor), r.code, time.Since(begun).Round(time.Millisecond))
	if r.reason != "" {
		line += ": " + r.reason
	}
	a.events.printf("%s", line)
	return r
}

// logName is a sensor's name for the log: quoted where it could be taken for
// more than that.
func logName(name string) string {
	if strings.Trim(name, "-._0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") != "" {
		return cut(name)
	}
	return name
}

func (a *agent) listSensors(r request, params []any) (any, error) {
	if len(params) != 0 {
		return nil, faultf(faultParams, "cmd_list_sensors takes no parameters")
	}
	ctx, cancel := context.WithCancel(a.ctx)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	texts, err := a.setup.Load().sensors.helpTexts(ctx)
	if err != nil {
		a.handler.refused.printf(warning+"%v", err) // without the directory there are no others
	}
	result := map[string]any{}
	for name, text := range texts {
		result[name] = text
	}
	result[ownSensor] = ownHelp()
	return result, nil
}

func healthcheck(_ request, params []any) (any, error) {
	if len(params) != 0 {
		return nil, faultf(faultParams, "healthcheck takes no parameters")
	}
	return "OK", nil
}

func runCheck(ctx context.Context, in invocation) error {
	if len(in.args) == 0 {
		return usagef("usage: picket check SENSOR [ARG...]")
	}
	name, err := sensorOnDisk(in.args[0])
	if err != nil {
		return &exitError{exitUsage, err}
	}
	s, err := loadSettings(in.config)
	if err != nil {
		return err
	}
	sensors := installedSensors(s)
	r := sensors.read(ctx, name, in.args[1:], os.Stderr)
	value := r.value
	if value == "" {
		value = s.noValue
	}
	fmt.Fprintln(in.out, value)
	code := r.code
	if code < 0 {
		code = 128 - code // as a shell shows a signal
	}
	switch {
	case code == 0:
		return nil
	case r.reason == "":
		return &exitError{code, nil}
	}
	return &exitError{code, fmt.Errorf("sensor %s: %s", name, r.reason)}
}

func runList(ctx context.Context, in invocation) error {
	if err := in.takes(0, 0, "list"); err != nil {
		return err
	}
	s, err := loadSettings(in.config)
	if err != nil {
		return err
	}
	sensors := installedSensors(s)
	texts, err := sensors.helpTexts(ctx)
	if err != nil {
		return err
	}
	if len(texts) == 0 {
		return errors.New(noSensors(sensors))
	}
	texts[ownSensor] = ownHelp()
	for _, name := range sortedKeys(texts) {
		fmt.Fprintf(in.out, "%s\n%s", name, indent(texts[name], "  "))
	}
	return nil
}

// sensorOnDisk returns the name of a sensor that is a directory.
func sensorOnDisk(v string) (string, error) {
	name, err := sensorName(v)
	if name == ownSensor {
		err = fmt.Errorf("the sensor %s is the agent itself: only a running one answers to that name, and no other sensor can have it", ownSensor)
	}
	return name, err
}

// indent returns the lines of a text, each with something before it.
func indent(text, by string) string {
	return by + strings.ReplaceAll(text, "\n", "\n"+by) + "\n"
}

func runUpdate(ctx context.Context, in invocation) error {
	return changeSensor(ctx, in, "update SENSOR", func(s settings, u *updater, name string) error {
		c := monitorOf(s)
		defer c.close()
		return u.install(ctx, name, fromMonitor(c, name, s.maxPackage))
	})
}

func runRollback(ctx context.Context, in invocation) error {
	return changeSensor(ctx, in, "rollback SENSOR", func(_ settings, u *updater, name string) error {
		return u.rollback(ctx, name)
	})
}

func runInstall(ctx context.Context, in invocation) error {
	if err := in.takes(1, 1, "install FILE.tar.bz2"); err != nil {
		return err
	}
	file := in.args[0]
	name := filepath.Base(file)
	for _, suffix := range []string{".tar", ".tar.bz2", ".tar.gz", ".tbz2", ".tgz"} {
		if before, ok := strings.CutSuffix(name, suffix); ok {
			name = before
			break
		}
	}
	in.args = []string{name}
	return changeSensor(ctx, in, "install FILE.tar.bz2", func(_ settings, u *updater, name string) error {
		return u.install(ctx, name, fromFile(file))
	})
}

// changeSensor makes a change of a sensor by hand, and shows it going on
// where somebody watches.
func changeSensor(ctx context.Context, in invocation, usage string, change func(settings, *updater, string) error) error {
	if err := in.takes(1, 1, usage); err != nil {
		return err
	}
	name, err := sensorOnDisk(in.args[0])
	if err != nil {
		return &exitError{exitUsage, err}
	}
	s, err := loadSettings(in.config)
	if err != nil {
		return err
	}
	u := updaterOf(s, installedSensors(s))
	verb, _, _ := strings.Cut(usage, " ")
	if info, err := os.Stderr.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
		u.progress = func(step string) { fmt.Fprintf(os.Stderr, "\r\x1b[K%s", step) }
	}
	err = change(s, u, name)
	u.progress("") // leaves the line empty
	if err != nil {
		return fmt.Errorf("%s %s: %w", verb, name, err)
	}
	fmt.Fprintf(in.out, "%s %s: done\n", verb, name)
	return nil
}

func runConfig(_ context.Context, in invocation) error {
	file, err := findConfig(in.config)
	if err != nil {
		return err
	}
	if len(in.args) == 0 {
		return printConfig(file, in.out)
	}
	verb := in.args[0]
	in.args = in.args[1:]
	c, err := readINI(file)
	if err != nil {
		return &exitError{exitUsage, err}
	}
	switch verb {
	case "get":
		if err := in.takes(2, 2, "config get SECTION OPTION"); err != nil {
			return err
		}
		value, err := c.value(in.args[0], in.args[1])
		if err != nil {
			return err
		}
		fmt.Fprintln(in.out, redacted(value))
		return nil
	case "set":
		if len(in.args) == 0 || len(in.args)%3 != 0 {
			return usagef("usage: picket config set SECTION OPTION VALUE [SECTION OPTION VALUE...]")
		}
		return editConfig(file, true, func(c *ini) error {
			for args := in.args; len(args) > 0; args = args[3:] {
				if err := c.set(args[0], args[1], args[2]); err != nil {
					return err
				}
			}
			return nil
		})
	case "unset":
		if err := in.takes(1, 2, "config unset SECTION [OPTION]"); err != nil {
			return err
		}
		return editConfig(file, false, func(c *ini) error {
			var found bool
			var err error
			if len(in.args) == 1 {
				found, err = c.removeSection(in.args[0])
			} else {
				found, err = c.removeOption(in.args[0], in.args[1])
			}
			if err == nil && !found {
				err = fmt.Errorf("%s: no such section or option", file)
			}
			return err
		})
	}
	return usagef("unknown command %q; see picket help", "config "+verb)
}

// editConfig changes client.cfg, unless that would break settings that are in
// order, or where they have to be known give it a name that nobody reads.
func editConfig(file string, known bool, change func(*ini) error) error {
	var warnings []string
	err := editINI(file, nil, func(c *ini) error {
		_, old, before := c.settings(filepath.Dir(file))
		if err := change(c); err != nil {
			return err
		}
		_, all, err := c.settings(filepath.Dir(file))
		if err != nil && before == nil {
			return &exitError{exitUsage, fmt.Errorf("not changed: %w", err)}
		}
		warnings = slices.DeleteFunc(all, func(w string) bool { return slices.Contains(old, w) })
		if known && len(warnings) > 0 {
			return &exitError{exitUsage, fmt.Errorf("not changed: %s", warnings[0])}
		}
		return nil
	})
	for _, w := range warnings {
		log.Print(warning + w)
	}
	return err
}

// redacted is a value without the password of a URL.
func redacted(value string) string {
	if u, err := url.Parse(value); err == nil && u.User != nil {
		return u.Redacted()
	}
	return masked(value, "")
}

// printConfig prints every option as INI, with its value or default. A
// password in a URL is not shown.
func printConfig(file string, out io.Writer) error {
	c, s, err := readSettings(file)
	if err != nil {
		return err
	}
	if warns := noSensors(installedSensors(s)); warns != "" {
		log.Print(warning + warns)
	}
	effective := &ini{name: file, values: make(map[iniKey]iniValue)}
	for _, o := range options {
		value, err := c.value(o.section, o.name)
		if err == nil {
			err = effective.set(o.section, o.name, redacted(value))
		}
		if err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "# %s; paths start from its directory\n%s", file, effective.text())
	return nil
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
	flags := newFlags("call")
	files := tlsFlags(flags)
	if err := flags.Parse(in.args); err != nil {
		return flagError(err, in.out)
	}
	if in.args = flags.Args(); len(in.args) < 2 {
		return usagef("usage: picket call [-ca FILE] [-cert FILE -key FILE] URL METHOD [ARG...]")
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
		return fmt.Errorf("call %s: %w", u.Redacted(), err)
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(in.out, readable(v))
	return nil
}

// wireValue is an argument of the command line as a value: a whole number as
// int, or as i8 where an int is too small, anything else as a string.
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

// readable is a value for people: one line an element or member.
func readable(v any) string {
	switch v := v.(type) {
	case nil:
		return "nil"
	case []byte:
		return base64.StdEncoding.EncodeToString(v)
	case []any:
		var lines []string
		for _, e := range v {
			lines = append(lines, "- "+strings.ReplaceAll(readable(e), "\n", "\n  "))
		}
		return strings.Join(lines, "\n")
	case map[string]any:
		var lines []string
		for _, name := range sortedKeys(v) {
			text := readable(v[name])
			if strings.Contains(text, "\n") {
				text = "\n" + strings.TrimSuffix(indent(text, "  "), "\n")
			} else {
				text = " " + text
			}
			lines = append(lines, name+":"+text)
		}
		return strings.Join(lines, "\n")
	}
	return fmt.Sprint(v)
}

func runMonitor(ctx context.Context, in invocation) error {
	flags := newFlags("monitor")
	listen := flags.String("listen", "127.0.0.1:8081", "")
	m := &monitor{}
	flags.StringVar(&m.packages, "packages", "", "")
	flags.StringVar(&m.next, "next", "", "")
	files := tlsFlags(flags)
	if err := flags.Parse(in.args); err != nil {
		return flagError(err, in.out)
	}
	if flags.NArg() > 0 {
		return usagef("monitor takes no argument %q", flags.Arg(0))
	}
	if m.next != "" {
		if _, err := httpURL(m.next); err != nil {
			return &exitError{exitUsage, fmt.Errorf("-next: %w", err)}
		}
	}
	if m.packages != "" {
		if _, err := os.ReadDir(m.packages); err != nil {
			return usagef("-packages: %w", err)
		}
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
	m.stored = func(s stored) error {
		_, err := fmt.Fprintln(in.out, s)
		return err
	}
	return m.serve(ctx, listener)
}

// A stored is a reading that has arrived at the stand-in monitor.
type stored struct {
	time   dateTime
	peer   string
	ticket any
	code   int
	value  string
}

func (s stored) String() string {
	return fmt.Sprintf("%s %s %s: exit %d, value %s", s.time, s.peer, ticketText(s.ticket), s.code, oneLine(s.value))
}

// A monitor stands in for the real one, in labs and tests.
type monitor struct {
	packages string             // the directory that holds SENSOR.tar.bz2; "" serves none
	next     string             // the URL that agents move to; "" is none
	stored   func(stored) error // is called for each reading, one at a time
	tls      *tls.Config        // nil: without TLS

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
		{"cmd_store_probe_data", "string int array dateTime.iso8601", "Takes a reading: ticket, [exit code, value], time.", m.store},
		{"cmd_get_sensor_code", "base64 string", "The package of a sensor.", m.sensorCode},
		{"cmd_get_sensor_signature", "base64 string", "The signature of a sensor's package.", m.sensorSignature},
		{"cmd_get_new_monitor_url", "string string", "The URL of the monitor that a host moves to.", m.nextURL},
		{"healthcheck", "string", "OK.", healthcheck},
	}
}

func (m *monitor) store(r request, params []any) (any, error) {
	s, err := storedOf(r.peer, params)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return "OK", m.stored(s)
}

// storedOf reads the parameters of cmd_store_probe_data.
func storedOf(peer string, params []any) (stored, error) {
	wrong := faultf(faultParams, "cmd_store_probe_data takes ticket, [exit code as int, value as string], time as dateTime.iso8601")
	if len(params) != 3 {
		return stored{}, wrong
	}
	ticket, err := ticketOf(params[0])
	pair, ok := params[1].([]any)
	at, ok2 := params[2].(dateTime)
	if err != nil || !ok || !ok2 || len(pair) != 2 {
		return stored{}, wrong
	}
	code, ok := pair[0].(int)
	value, ok2 := pair[1].(string)
	if !ok || !ok2 {
		return stored{}, wrong
	}
	return stored{at, peer, ticket, code, value}, nil
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
	if err != nil {
		return nil, faultf(faultParams, "%v", err)
	}
	if m.packages == "" {
		return nil, faultf(faultParams, "this monitor serves no packages")
	}
	f, err := os.Open(filepath.Join(m.packages, name+suffix))
	if err != nil {
		return nil, faultf(faultParams, "no %s%s here", name, suffix)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxPackage+1))
	if err == nil && len(data) > maxPackage {
		err = faultf(faultParams, "%s%s is larger than the %d bytes that a stand-in serves", name, suffix, maxPackage)
	}
	return data, err
}

func (m *monitor) nextURL(_ request, params []any) (any, error) {
	if len(params) != 1 {
		return nil, faultf(faultParams, "cmd_get_new_monitor_url takes the host name of the agent")
	}
	if m.next == "" {
		return nil, faultf(faultParams, "there is no new monitor")
	}
	return m.next, nil
}

// Own sensors of the selftest: what every box must be able to run.
var ownSensors = map[string]string{
	"good":    "echo 42",
	"failing": "echo no such thing >&2; exit 3",
	"hanging": "sleep 60",
	"garbage": "echo hello",
}

// Own packages of the selftest, and what is in them.
var ownPackages = map[string]string{
	"good":    "echo 43",
	"garbage": "exit 1",
}

// ownCommands is what the selftest asks of its own sensors, and what must
// come of it.
var ownCommands = []struct {
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
	stored  chan stored
	tickets int
	failed  int
}

func runSelftest(ctx context.Context, in invocation) error {
	if err := in.takes(0, 0, "selftest"); err != nil {
		return err
	}
	s, installed := settings{}, true
	file, err := findConfig(in.config)
	if err == nil {
		s, err = loadSettings(file)
	} else if in.config == "" {
		installed = false
		s, _, err = (&ini{}).settings("")
	}
	if err != nil {
		return err
	}
	dir, err := scratchDir(s)
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var lines bytes.Buffer // of the log, which are of interest only if it fails
	before := log.Writer()
	log.SetOutput(plainLog{&lines})
	fmt.Fprintf(in.out, "picket %s in %s\n", version(), dir)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err = (&selftest{out: in.out}).run(ctx, s, dir, installed)
	log.SetOutput(before)
	if err != nil {
		fmt.Fprintf(in.out, "\nlog:\n%s", indent(strings.TrimSpace(lines.String()), "  "))
		return fmt.Errorf("selftest: %w", err)
	}
	fmt.Fprintln(in.out, "selftest passed")
	return nil
}

// scratchDir makes a directory in which a script can be run. A box may have
// /tmp mounted noexec, or not at all.
func scratchDir(s settings) (string, error) {
	var errs []error
	for _, parent := range []string{os.TempDir(), "/var/tmp", "/dev/shm", filepath.Dir(s.path), "."} {
		dir, err := os.MkdirTemp(parent, "picket-selftest-")
		if err == nil {
			if err = tryScript(dir, s.user); err == nil {
				return filepath.Abs(dir)
			}
			os.RemoveAll(dir)
		}
		errs = append(errs, err)
	}
	return "", fmt.Errorf("selftest: no directory to run a shell script in: %w", errors.Join(errs...))
}

// tryScript runs a script in a directory, as a sensor.
func tryScript(dir string, user *account) error {
	if err := makeSensor(filepath.Join(dir, "try"), "echo 1"); err != nil {
		return err
	}
	r := newSensors(dir, "check", "options", time.Minute, user).read(context.Background(), "try", nil, nil)
	if r.code != 0 {
		return fmt.Errorf("%s: exit %d: %s", dir, r.code, r.reason)
	}
	return os.RemoveAll(filepath.Join(dir, "try"))
}

func writeScript(file, script string) error {
	if err := os.WriteFile(file, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		return err
	}
	return os.Chmod(file, 0o755) // whatever the umask: it may be for another user
}

func (t *selftest) run(ctx context.Context, s settings, dir string, installed bool) error {
	t.stored = make(chan stored, 1)
	ctx, cancel := context.WithCancel(ctx)
	var ended sync.WaitGroup
	defer func() { cancel(); ended.Wait() }()
	packages := filepath.Join(dir, "packages")
	next, err := t.startMonitor(ctx, &ended, &monitor{})
	if err == nil {
		t.monitor, err = t.startMonitor(ctx, &ended, &monitor{packages: packages, next: next.String()})
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(t.out, "%-12s %-16s %4s  %s\n", "sensor", "arguments", "exit", "value")
	if err := t.ownSensors(ctx, s, dir, packages); err != nil {
		return err
	}
	if installed {
		if err := t.readInstalled(ctx, s); err != nil {
			return err
		}
	}
	if t.failed > 0 {
		return fmt.Errorf("%s not as it should be", plural(t.failed, "thing"))
	}
	return nil
}

// startMonitor runs a stand-in for the monitor until ctx ends.
func (t *selftest) startMonitor(ctx context.Context, ended *sync.WaitGroup, m *monitor) (*url.URL, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	m.stored = func(s stored) error { t.stored <- s; return nil }
	ended.Add(1)
	go func() {
		defer ended.Done()
		if err := m.serve(ctx, listener); err != nil {
			log.Print(err)
		}
	}()
	return &url.URL{Scheme: "http", Host: listener.Addr().String(), Path: "/xmlrpc/"}, nil
}

// ownSensors does with the selftest's own sensors all that a monitor can ask.
func (t *selftest) ownSensors(ctx context.Context, s settings, dir, packages string) error {
	s.file, s.path, s.backup = filepath.Join(dir, "client.cfg"), filepath.Join(dir, "sensors"), filepath.Join(dir, "backup")
	s.executable, s.help, s.timeout, s.update, s.publicKey = "check", "options", time.Second, true, ""
	if err := os.WriteFile(s.file, nil, 0o600); err != nil {
		return err
	}
	for name, script := range ownSensors {
		if err := makeSensor(filepath.Join(s.path, name), script); err != nil {
			return err
		}
	}
	if err := os.Mkdir(packages, 0o700); err != nil {
		return err
	}
	for name, script := range ownPackages {
		if err := os.WriteFile(filepath.Join(packages, name+".tar.bz2"), tarOf(name, "#!/bin/sh\n"+script+"\n"), 0o600); err != nil {
			return err
		}
	}
	return t.withAgent(ctx, s, func(a *selftestAgent) error {
		for _, c := range ownCommands {
			got, _, err := t.outcome(ctx, a, c.command, c.sensor, nil)
			if err != nil {
				return err
			}
			remark := "as it should be"
			if got.code != c.code || got.value != c.value {
				remark = fmt.Sprintf("FAILED: should be exit %d, value %s", c.code, c.value)
				t.failed++
			}
			label := c.sensor
			var args []any
			if c.command != "cmd_submit_reading" {
				label, args = strings.Split(c.command, "_")[1], []any{c.sensor}
			}
			t.row(label, args, got, remark)
		}
		return nil
	})
}

// makeSensor makes a directory with a script in it, for any user to run.
func makeSensor(dir, script string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, dir := range []string{filepath.Dir(dir), dir} {
		if err := os.Chmod(dir, 0o755); err != nil { // whatever the umask
			return err
		}
	}
	return writeScript(filepath.Join(dir, "check"), script)
}

// tarOf returns a package, not compressed, of a sensor with nothing but its
// executable.
func tarOf(name, check string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755},
		{Typeflag: tar.TypeReg, Name: name + "/check", Mode: 0o755, Size: int64(len(check))},
	} {
		w.WriteHeader(h) // writing to a Buffer cannot fail
	}
	io.WriteString(w, check)
	w.Close()
	return b.Bytes()
}

// readInstalled takes a reading from every sensor of the configured
// directory: the first thing that its help says it can be asked.
func (t *selftest) readInstalled(ctx context.Context, s settings) error {
	return t.withAgent(ctx, s, func(a *selftestAgent) error {
		v, err := a.client.call(ctx, "cmd_list_sensors")
		if err != nil {
			return fmt.Errorf("cmd_list_sensors: %w", err)
		}
		texts, _ := v.(map[string]any)
		if len(texts) == 0 {
			fmt.Fprintln(t.out, noSensors(a.sensors))
		}
		for _, name := range sortedKeys(texts) {
			help, _ := texts[name].(string)
			if strings.HasPrefix(help, noHelp) {
				fmt.Fprintf(t.out, "%-12s FAILED: %s\n", name, help)
				t.failed++
				continue
			}
			args := firstOption(help)
			got, reason, err := t.outcome(ctx, a, "cmd_submit_reading", name, args)
			if err != nil {
				return err
			}
			remark := ""
			switch {
			case got.code > 0 && reason != "" && !slices.Contains([]int{codeNoNumber, codeNotStarted, codeNotFound}, got.code):
				remark = "not counted: " + reason
			case got.code != 0:
				remark = "FAILED: " + reason
				t.failed++
			}
			t.row(name, args, got, remark)
		}
		return nil
	})
}

// firstOption is how to ask a sensor for the first thing in its help.
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

func (t *selftest) row(name string, args []any, got stored, remark string) {
	fmt.Fprintln(t.out, strings.TrimSpace(fmt.Sprintf("%-12s %-16s %4d  %-12s %s", name, strings.Trim(fmt.Sprint(args), "[]"), got.code, got.value, remark)))
}

// A selftestAgent is an agent that runs, and how to reach it.
type selftestAgent struct {
	sensors *sensors
	client  *client
	mu      sync.Mutex // guards reason
	reason  map[any]string
}

// withAgent calls f while an agent with these settings runs, but for the
// address, the monitor and the log, which are the selftest's own.
func (t *selftest) withAgent(ctx context.Context, s settings, f func(*selftestAgent) error) error {
	s.listen, s.monitor, s.noValue, s.spool = "127.0.0.1:0", t.monitor, "nan", ""
	s.allow, s.agentTLS, s.monitorTLS = nil, tlsFiles{}, tlsFiles{}
	a, err := newAgent(s)
	if err != nil {
		return err
	}
	tested := &selftestAgent{
		sensors: a.setup.Load().sensors,
		client:  newClient(&url.URL{Scheme: "http", Host: a.listener.Addr().String(), Path: "/xmlrpc"}, time.Minute+s.timeout, nil),
		reason:  make(map[any]string),
	}
	defer tested.client.close()
	a.queue.deliver = func(ticket any, r reading) {
		tested.mu.Lock()
		tested.reason[ticket] = r.reason
		tested.mu.Unlock()
		a.delivery.put(ticket, r)
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- a.run(ctx) }()
	err = f(tested)
	cancel()
	return errors.Join(err, <-ended)
}

// outcome gives one command and waits for what comes of it at the monitor.
func (t *selftest) outcome(ctx context.Context, a *selftestAgent, command, sensor string, args []any) (stored, string, error) {
	t.tickets++
	ticket := t.tickets
	params := []any{ticket, sensor, args}
	switch command {
	case "cmd_register_new_server":
		params = []any{ticket}
	case "cmd_update_sensor_code", "cmd_rollback_sensor_code":
		params = []any{sensor, ticket}
	}
	v, err := a.client.call(ctx, command, params...)
	if err == nil && v != "OK" {
		err = fmt.Errorf("acknowledged with %v", v)
	}
	if err != nil {
		return stored{}, "", fmt.Errorf("%s %s: %w", command, sensor, err)
	}
	timer := time.NewTimer(a.client.timeout)
	defer timer.Stop()
	select {
	case got := <-t.stored:
		if got.ticket != any(ticket) {
			return got, "", fmt.Errorf("%s %s: the monitor got %v for ticket %d", command, sensor, got, ticket)
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		return got, a.reason[ticket], nil
	case <-timer.C:
		return stored{}, "", fmt.Errorf("%s %s: nothing has arrived at the monitor", command, sensor)
	case <-ctx.Done():
		return stored{}, "", ctx.Err()
	}
}
