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
// The agent runs what is in its directory of sensors and nothing else; only its monitor
// can change that, or, with [sensor] public_key, whoever has the secret key. A command only
// chooses a sensor and gives it arguments, which no shell ever sees. Readings go to the
// monitor of client.cfg or nowhere. Whoever can reach its port, and passes [agent] allow
// and client_ca, can make it run sensors, at most [sensor] concurrency at once, but cannot
// see what they print.
//
// # What lasts
//
// The reading of an acknowledged command is in memory until the monitor has answered.
// With [monitor] spool it is on the disk as well, once an attempt has failed or some
// seconds have passed. The limits, and what happens at each, stand with the constants.
//
// # Files
//
// They depend downwards: main, update, sensors, rpc. Only main uses the settings of
// config; all use its functions that read, lock and replace files.
//
// # The way of a reading
//
//  1. handler.ServeHTTP checks the caller, the path and the size of a request.
//  2. decodeCall reads the method and its parameters.
//  3. agent.submits makes a command of them: ticket, sensor, arguments.
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
//  1. agent.submits makes a command of sensor and ticket.
//  2. queue.accept gives it a place. When it begins, equal ones that wait join it.
//  3. agent.makeChange calls updater.install, which takes the steps of a change.
//  4. begin opens the directories and locks them; settle finishes an earlier change.
//  5. fetch writes the package to the staging directory.
//  6. verify checks its signature.
//  7. unpack unpacks it there; checkVersion refuses an older version.
//  8. try runs it once, for its help text; give hands it to its owner and syncs it.
//  9. replace links or copies the installed version to a hidden backup, moves it out of
//     the way and renames the new one to its place, which decides.
//  10. settle publishes the backup, prune removes old ones, and the next change the version
//     that was replaced; the outcome, 1 or nan, is delivered like a reading.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/syslog"
	"maps"
	"net"
	"net/http"
	"net/netip"
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
	"unicode"
)

const (
	sensorsTime = 5 * time.Second  // for running sensors when the agent ends
	deliverTime = 5 * time.Second  // for undelivered readings after that
	reloadTime  = time.Second      // between two reads of client.cfg that must be equal
	selfTime    = 2 * time.Minute  // for the steps of the selftest
	initTime    = 30 * time.Second // an agent that init started waits this long before it ends with an error
	greetPause  = time.Second      // from the start to the call of the monitor, which would delay the first answer
	helloTime   = 5 * time.Second  // to see whether a peer speaks TLS
	lastLogTime = time.Second      // for the last lines of the log when the agent ends

	logLines = 256 // lines of the log that wait to be written
)

// The limits of the stand-in monitor.
const (
	maxServed    = 4 << 20          // bytes of a package that it serves
	monitorConns = 256              // connections of agents, and as many that ask for probes
	maxReads     = 32               // readings of a probe
	probeWait    = 10 * time.Second // for the readings of a probe, where a scrape names no time
	maxScrape    = time.Hour        // the longest time that a scrape may name
	probeTicket  = "probe-"         // begins the ticket of a probe
)

var errNoConfig = errors.New("no client.cfg")

// Exit codes of the process. That of picket check is the sensor's.
const (
	exitFailed = 1
	exitUsage  = 2 // or configuration
)

// The linker writes these into the binary that make builds.
var (
	release = "(devel)" // as git describes the source
	built   string      // when the source was committed, in seconds since 1970
)

var version = release + " " + runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	go func() { // while the rest starts, as each signal takes two switches between threads
		ends := make(chan os.Signal, 1)
		signal.Notify(ends, syscall.SIGINT, syscall.SIGTERM)
		<-ends
		signal.Reset(syscall.SIGINT) // a second one ends the process at once
		cancel()
	}()
	log.SetFlags(0)
	log.SetOutput(&logWriter{plain: os.Stderr})
	closeOnExec()
	tz, ok := os.LookupEnv("TZ")
	time.Local = localZone(tz, ok, "/etc")
	var lost error // of the output
	code, err := execute(ctx, os.Args[1:], writerFunc(func(p []byte) (int, error) {
		n, err := os.Stdout.Write(p)
		if err != nil && lost == nil {
			lost = fmt.Errorf("write the output: %w", err)
		}
		return n, err
	}))
	if code == 0 && lost != nil {
		code, err = exitFailed, lost
	}
	if err != nil {
		log.Print(err)
	}
	os.Exit(code)
}

// closeOnExec keeps the files that picket inherited from sensors: one may be a lock or a secret.
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
// which is ignored for this moment. A session for each sensor would be simpler,
// but a sensor that leads one hangs up each modem that it opens.
func leaveTerminal() {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		return // there is none
	}
	defer tty.Close()
	signal.Ignore(syscall.SIGHUP)
	defer signal.Reset(syscall.SIGHUP)
	syscall.Syscall(syscall.SYS_IOCTL, tty.Fd(), syscall.TIOCNOTTY, 0)
}

// An exitError ends the process with its code. Its error is nil if there is nothing to say.
type exitError struct {
	code int
	error
}

func (e *exitError) Unwrap() error { return e.error }

// usagef returns an error of usage or configuration.
func usagef(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// A subcommand is a command of the command line.
type subcommand struct {
	name, args  string
	flags       string // NAME or NAME=DEFAULT; each takes a value
	least, most int    // arguments beside the flags; most < 0: any number that -most divides
	needs       int    // what is read before it runs
	run         func(context.Context, *invocation) error
	page        string // the first line is its line of "picket help"
}

// What a subcommand needs.
const (
	needsNothing  = iota
	needsINI      // client.cfg
	needsSettings // its settings, for a subcommand that runs sensors: the terminal is given up
)

const (
	tlsArgs   = "[-ca FILE] [-cert FILE -key FILE]"
	exitCodes = "Exit codes: 0; 1 it went wrong; 2 usage or configuration"
)

// subcommands lists what picket can be told to do, each with its page of the help.
var subcommands = []subcommand{
	{"", "help", "", 0, 0, needsNothing, runAgent, "run the agent until SIGTERM or SIGINT"},
	{"check", "SENSOR [ARG...]", "", 1, -1, needsSettings, runCheck, `run one sensor as the agent would
It prints the value or, asked for its options alone, the help text.
  picket check disk percent /
  picket check disk options
Exit codes: the sensor's; 128 + S where signal S ended it; 65 no number;
126 not started; 127 no such sensor; 2 usage or configuration.`},
	{"list", "", "", 0, 0, needsSettings, runList, `the sensors, what they can be asked
  picket list`},
	{"config", "", "", 0, 0, needsINI, runConfig, `check client.cfg, print every option
Each with its value or default. A password is shown as xxxxx.
  picket config
  picket -c /etc/picket.cfg config
See also: picket help config get, config set, config unset.`},
	{"config get", "SECTION OPTION", "", 2, 2, needsINI, runConfigGet, `print one value
Or its default. A password is shown as xxxxx.
  picket config get monitor url`},
	{"config set", "SECTION OPTION VALUE [SECTION OPTION VALUE...]", "", 3, -3, needsINI, runConfigEdit,
		`change values in place
Every other byte of client.cfg stays. A change that makes it wrong is refused.
  picket config set monitor url http://monitor:8081/xmlrpc/`},
	{"config unset", "SECTION [OPTION]", "", 1, 2, needsINI, runConfigEdit, `remove an option or a section
Comments stay.
  picket config unset monitor spool`},
	{"update", "SENSOR", "", 1, 1, needsSettings, runChange, `fetch a package and install it
It comes from the monitor of client.cfg.
  picket update disk`},
	{"rollback", "SENSOR", "", 1, 1, needsSettings, runChange, `put the newest backup back in place
The version replaced becomes a backup.
  picket rollback disk`},
	{"install", "FILE.tar.bz2", "", 1, 1, needsSettings, runChange, `install a package that lies here
Its name is the sensor's. With a public_key it needs FILE.tar.bz2.sig beside it.
  picket install packages/disk.tar.bz2`},
	{"call", tlsArgs + " URL METHOD [ARG...]", "ca cert key", 2, -1, needsNothing, runCall, `call an XML-RPC method
It prints the result. A whole number is sent as int, anything else as string.
  -ca FILE    the CA of an https URL, else the system's list
  -cert FILE -key FILE    the certificate to show
  picket call http://127.0.0.1:8080/ cmd_submit_reading 7 disk "percent /"`},
	{"monitor", "[-listen ADDRESS] [-packages DIR] [-next URL] [-probe ADDRESS] " + tlsArgs +
		" [-agent-ca, -agent-cert, -agent-key FILE]",
		"listen=127.0.0.1:8081 packages next probe ca cert key agent-ca agent-cert agent-key", 0, 0, needsNothing, runMonitor,
		`print readings, answer Prometheus
  -listen ADDRESS    where it serves agents, else 127.0.0.1:8081
  -probe ADDRESS    where it serves Prometheus: whoever asks commands agents
  -packages DIR    the directory of SENSOR.tar.bz2 that it serves
  -next URL    where agents move to
  -cert FILE -key FILE    it serves https
  -ca FILE    only callers with a certificate of this CA are served
  -agent-ca, -agent-cert, -agent-key FILE    for probes of agents with TLS
  picket monitor -listen :8081 -packages packages`},
	{"selftest", "", "", 0, 0, needsNothing, runSelftest, `prove that all works on this box
It runs sensors of its own, in TMPDIR or /tmp, then each one that is installed.
  TMPDIR=/opt/picket picket selftest`},
	{"version", "", "", 0, 0, needsNothing, runVersion, `version, commit, Go, architecture
  picket version`},
	{"help", "[COMMAND]", "", 0, 0, needsNothing, nil, `this page, or that of a command
  picket help config set`},
}

// An invocation is one call of the program.
type invocation struct {
	command  *subcommand
	flags    map[string]*string // those of the subcommand, and -c
	args     []string           // beside the flags
	out      io.Writer
	ini      *ini      // client.cfg, if the subcommand needs it
	settings *settings // its settings, if the subcommand needs them
}

// execute runs a command line. It returns the exit code, and an error that shows no password.
func execute(ctx context.Context, args []string, out io.Writer) (int, error) {
	in := &invocation{command: &subcommands[0], flags: make(map[string]*string), out: out}
	err := in.run(ctx, args)
	if err == nil {
		return 0, nil
	}
	coded := &exitError{exitFailed, err}
	if errors.As(err, &coded); coded.error == nil {
		return coded.code, nil
	}
	err = errors.New(masked(err.Error()))
	if in.command.name == "" && os.Getppid() == 1 {
		waitUnderInit(ctx, err)
		err = nil
	}
	return coded.code, err
}

// waitUnderInit delays the end of an agent that process 1 has started and that cannot
// run, say for a wrong client.cfg: process 1 starts it again without a pause.
func waitUnderInit(ctx context.Context, err error) {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGHUP, syscall.SIGUSR1)
	log.Printf("%v; ends in %v, or at a signal", err, initTime)
	time.AfterFunc(initTime, stop)
	<-ctx.Done()
}

// run parses the arguments, reads what the subcommand needs, and runs it or prints its page.
func (in *invocation) run(ctx context.Context, args []string) error {
	err := in.parse(args)
	switch needs := in.command.needs; {
	case errors.Is(err, flag.ErrHelp):
		in.help()
		return nil
	case err == nil && needs == needsINI:
		in.ini, err = readConfig(*in.flags["c"])
	case err == nil && needs == needsSettings:
		leaveTerminal()
		in.settings, err = readSettings(*in.flags["c"])
	}
	if err != nil {
		return err
	}
	return in.command.run(ctx, in)
}

// parse finds the subcommand, its flags and arguments. It returns flag.ErrHelp for help.
func (in *invocation) parse(args []string) error {
	if len(args) == 1 && strings.TrimLeft(args[0], "-") == "version" {
		args = []string{"version"}
	}
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	in.flags["c"] = flags.String("c", "", "")
	if err := flags.Parse(args); err != nil { // flag.ErrHelp, too
		return in.usageError("%w", err)
	}
	words := flags.Args()
	asked := len(words) > 0 && words[0] == "help"
	if asked {
		words = words[1:]
	}
	for i, c := range subcommands { // "config get" comes after "config"
		if name := strings.Fields(c.name); slices.Equal(name, words[:min(len(name), len(words))]) {
			in.command, in.args = &subcommands[i], words[len(name):]
		}
	}
	c := in.command
	for _, f := range strings.Fields(c.flags) {
		name, value, _ := strings.Cut(f, "=")
		in.flags[name] = flags.String(name, value, "")
	}
	if err := flags.Parse(in.args); err != nil {
		return in.usageError("%w", err)
	}
	in.args = flags.Args()
	switch n := len(in.args); {
	case n > 0 && (c.name == "" || c.name == "config"):
		in.command = &subcommands[0]
		return in.usageError("unknown command %q", strings.TrimSpace(c.name+" "+in.args[0]))
	case asked:
		return flag.ErrHelp
	case n < c.least || c.most >= 0 && n > c.most || c.most < 0 && n%c.most != 0:
		return in.usageError("%s: arguments missing or too many", c.name)
	}
	return nil
}

// usageError returns an error that ends with the line to type.
func (in *invocation) usageError(format string, args ...any) error {
	return usagef(format+"; type: %s", append(args, in.command.usage())...)
}

// usage returns the line to type. For the agent itself that is "picket help".
func (c *subcommand) usage() string {
	return "picket " + strings.TrimSpace(c.name+" "+c.args)
}

// help prints the page of the subcommand or, if none was named, a line of each.
func (in *invocation) help() {
	if c := in.command; c.name != "" {
		fmt.Fprintf(in.out, "usage: %s\n%s\n", c.usage(), c.page)
		if !strings.Contains(c.page, "Exit codes") {
			fmt.Fprintf(in.out, "%s.\n", exitCodes)
		}
		return
	}
	fmt.Fprint(in.out, "usage: picket [-c client.cfg] [COMMAND]\n\n")
	for _, c := range subcommands {
		summary, _, _ := strings.Cut(c.page, "\n")
		fmt.Fprintf(in.out, "  picket %-13s %s\n", c.name, summary)
	}
	fmt.Fprintf(in.out, "\nclient.cfg is looked for in the working directory, then beside the program.\n"+
		"%s; check: the sensor's.\n", exitCodes)
}

func runVersion(_ context.Context, in *invocation) error {
	fmt.Fprintln(in.out, "picket", version)
	return nil
}

// readConfig reads and parses client.cfg: the one that is named, else the one in the
// working directory, else the one beside the program.
func readConfig(named string) (*ini, error) {
	program, _ := os.Executable() // where links lead to
	files := []string{"client.cfg", filepath.Join(filepath.Dir(program), "client.cfg")}
	if named != "" {
		files = []string{named}
	}
	for i, file := range files {
		if absolute, err := filepath.Abs(file); err == nil { // else the working directory is gone
			files[i] = absolute
		}
		if named != "" || exists(files[i]) {
			return readINI(files[i])
		}
	}
	return nil, usagef("%w: looked for %s; type: picket -c FILE ...",
		errNoConfig, strings.Join(slices.Compact(files), ", then "))
}

// readSettings returns the settings of the client.cfg that is named or found.
func readSettings(named string) (*settings, error) {
	c, err := readConfig(named)
	if err != nil {
		return nil, err
	}
	return checkSettings(c, wrong)
}

// checkSettings returns the settings. Findings of this gravity or a higher one are an
// error, and the others are logged.
func checkSettings(c *ini, grave int) (*settings, error) {
	s, found := checkAll(c)
	var errs []error
	for _, f := range found {
		if f.grave >= grave {
			errs = append(errs, errors.New(f.String()))
		} else {
			log.Printf(warning+"%s", f)
		}
	}
	if errs != nil {
		return nil, usagef("%w", errors.Join(errs...))
	}
	return s, nil
}

// checkAll checks the settings of client.cfg and the key that they name.
func checkAll(c *ini) (*settings, []finding) {
	s, found := c.settings()
	if _, err := readKeys(s.publicKey); s.publicKey != "" && err != nil {
		err = fmt.Errorf("%w: no package can be taken", err) // but an agent starts
		found = append(found, c.finding("sensor", "public_key", tolerated{err}))
	}
	return s, found
}

// runAgent runs the agent until ctx ends. It answers no call before the signals are caught.
func runAgent(ctx context.Context, in *invocation) error {
	leaveTerminal()
	signals, caught := make(chan os.Signal, 8), make(chan struct{})
	go func() { // while the rest starts, as in main
		signal.Notify(signals, syscall.SIGHUP, syscall.SIGUSR1)
		close(caught)
	}()
	logs := startLog()
	defer logs.close()
	s, err := readSettings(*in.flags["c"])
	if err != nil {
		return err
	}
	a, err := newAgent(s)
	if err != nil {
		return err
	}
	a.signals = signals
	a.applied = func(s *settings) { logs.useSyslog.Store(s.syslog); limitMemory(s) }
	a.applied(s)
	if os.Getenv("GOGC") == "" { // collect when the heap has grown by a quarter; later, as it delays the first answer
		defer time.AfterFunc(50*time.Millisecond, func() { debug.SetGCPercent(25) }).Stop()
	}
	a.recover(ctx)
	<-caught
	return a.run(ctx)
}

// limitMemory makes the garbage collector work harder once the memory exceeds 12 MiB and
// what a full queue and a full spool take, unless the environment has a GOMEMLIMIT.
func limitMemory(s *settings) {
	limit := int64(12<<20) + int64(s.queue)<<10
	if s.spool != "" {
		limit += 6 * s.spoolSize
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(limit)
	}
}

// A logWriter writes the log to the local syslog, or to standard error if that is wanted or
// there is no syslog. That of an agent has a goroutine, so nobody who logs waits for either.
// While they take nothing, 256 lines wait; further ones are counted and lost.
type logWriter struct {
	plain     io.Writer // standard error
	layout    string    // of the local time before each line there
	useSyslog atomic.Bool
	lines     chan string // wait for the goroutine; nil: there is none
	lost      atomic.Int64
	done      chan struct{}
}

// startLog starts the log of an agent. Its lines have a time where nothing else
// adds one: on a terminal and in a plain file.
func startLog() *logWriter {
	w := &logWriter{plain: os.Stderr, lines: make(chan string, logLines), done: make(chan struct{})}
	if info, err := os.Stderr.Stat(); err == nil && (info.Mode().IsRegular() || info.Mode()&os.ModeCharDevice != 0) {
		w.layout = "2006-01-02T15:04:05 "
	}
	go w.run()
	log.SetOutput(w)
	return w
}

func (w *logWriter) Write(line []byte) (int, error) {
	if w.lines == nil {
		w.print(string(line))
		return len(line), nil
	}
	select {
	case w.lines <- string(line):
	default:
		w.lost.Add(1)
	}
	return len(line), nil
}

// close writes what waits, for a second at most. Later lines go straight to standard error.
func (w *logWriter) close() {
	log.SetOutput(&logWriter{plain: w.plain, layout: w.layout})
	close(w.lines)
	select {
	case <-w.done:
	case <-time.After(lastLogTime):
	}
}

func (w *logWriter) run() {
	defer close(w.done)
	// These are caught and dropped: a reader of the log that ends, or a file that may not
	// grow, must not end the agent. If they were ignored, sensors would ignore them too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE, syscall.SIGXFSZ)
	for line := range w.lines {
		if n := w.lost.Swap(0); n > 0 {
			line = fmt.Sprintf(warning+"%s of the log lost: nobody took them\n", plural(int(n), "line")) + line
		}
		for _, line := range strings.Split(strings.TrimSuffix(line, "\n"), "\n") {
			w.print(line + "\n")
		}
	}
}

// print writes a line. It connects to syslog for each: so it finds a syslogd that is started anew.
func (w *logWriter) print(line string) {
	severity := syslog.LOG_INFO
	if len(line) > len(severe) && line[0] == severe[0] && line[2] == severe[2] {
		severity, line = syslog.Priority(line[1]-'0'), line[len(severe):]
	}
	if w.useSyslog.Load() {
		if daemon, err := syslog.New(syslog.LOG_DAEMON|severity, "picket"); err == nil {
			defer daemon.Close()
			if _, err = io.WriteString(daemon, line); err == nil {
				return
			}
		}
	}
	io.WriteString(w.plain, time.Now().Format(w.layout)+"picket: "+line)
}

// An active holds the settings in force and what was built from them.
type active struct {
	settings *settings
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
	applied  func(*settings)  // is called with new settings

	beside sync.WaitGroup  // what runs beside the queue
	ctx    context.Context // ends when the agent is to end
	cancel context.CancelFunc

	failedMu sync.Mutex
	failed   map[string]string // why the latest change of a sensor failed; failedMu guards it

	changing sync.Mutex // held while new settings are applied or client.cfg is written
	listener net.Listener
}

// newAgent returns an agent that listens but does not answer yet: run does.
func newAgent(s *settings) (*agent, error) {
	listener, err := net.Listen("tcp", s.listen)
	if err != nil {
		return nil, fmt.Errorf("[agent] listen: %w", err)
	}
	a := &agent{
		listener: listener, events: logLimit{burst: 1000, perSecond: 10}, started: time.Now(),
		applied: func(*settings) {}, failed: make(map[string]string),
	}
	a.active.Store(activate(s))
	a.handler = newHandler(a.commands())
	a.handler.setAccess(&access{s.allow, serverTLS(s.agentTLS)})
	c, zone, noValue := monitorOf(s)
	a.delivery = newDelivery(c, zone, noValue, time.Second, newSpool(s.spool, s.spoolSize))
	a.queue = newQueue(s.concurrency, s.queue, a.runCommand, a.delivery.put, a.delivery.discard)
	a.ctx, a.cancel = context.WithCancel(context.Background())
	return a, nil
}

// activate builds what settings describe.
func activate(s *settings) *active {
	sensors := newSensors(s.path, s.executable, s.help, s.timeout)
	sensors.user, sensors.own = s.user, s.own
	return &active{s, sensors, &updater{
		sensors: sensors, backup: s.backup, keys: s.publicKey,
		maxPackage: s.maxPackage, maxUnpacked: s.maxUnpacked, keep: s.keep,
	}}
}

// monitorOf returns the monitor, the zone of the times it gets, and what stands for no value.
func monitorOf(s *settings) (c *client, zone *time.Location, noValue string) {
	zone = time.Local
	if s.utc {
		zone = time.UTC
	}
	return newClient(s.monitor, s.monitorTimeout, clientTLS(s.monitorTLS)), zone, s.noValue
}

// clientTLS returns the rules for calls over https.
func clientTLS(t tlsFiles) *tls.Config {
	committed, _ := strconv.ParseInt(built, 10, 64) // 0 in a binary that make has not built
	c := newTLS(time.Unix(committed, 0))
	c.RootCAs = t.pool
	if t.pair != nil {
		c.Certificates = []tls.Certificate{*t.pair}
	}
	return c
}

// serverTLS returns the rules for those who call over TLS, or nil without a certificate.
func serverTLS(t tlsFiles) *tls.Config {
	if t.pair == nil {
		return nil
	}
	c := clientTLS(t)
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

// run answers commands until ctx ends. Then it gives running sensors five seconds and
// undelivered readings another five, and leaves no goroutine and no process behind.
func (a *agent) run(ctx context.Context) error {
	defer context.AfterFunc(ctx, a.cancel)()
	s := a.active.Load().settings
	log.Printf(notice+"%s on %s, sensors in %s, monitor %s",
		version, a.listener.Addr(), s.path, masked(s.monitor.String()))
	a.logWarnings()
	if os.Getpid() == 1 {
		a.goBeside(func() { a.active.Load().sensors.reapOrphans(a.ctx) })
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		a.handleSignals()
		a.end()
	}()
	// The caller's stack is large already. That of a new goroutine would grow while it waits
	// for a connection, and so make 300 KiB of the binary resident.
	err := a.handler.serve(a.listener)
	a.cancel()
	<-ended
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve %s: %w", a.listener.Addr(), err)
}

// handleSignals does what signals ask for, and greets the monitor, until the agent is to end.
func (a *agent) handleSignals() {
	for pause := time.After(greetPause); ; {
		select {
		case <-a.ctx.Done():
			return
		case <-pause:
			a.goBeside(a.greet)
		case s := <-a.signals:
			if s == syscall.SIGHUP {
				a.reload()
			} else {
				log.Print(notice + a.healthLine())
			}
		}
	}
}

// end ends the agent, as run says.
func (a *agent) end() {
	log.Print(notice + "ending")
	a.delivery.putLast()
	if names := strings.Join(a.queue.running(), ", "); names != "" {
		log.Printf(notice+"ending: waits for %s, at most %v", oneLine(names), sensorsTime)
	}
	within(sensorsTime, a.queue.close)
	a.beside.Wait()
	a.active.Load().sensors.awaitListing()
	within(time.Second, func(ctx context.Context) { a.handler.http.Shutdown(ctx) })
	a.handler.http.Close() // the connections that are left
	if n := a.delivery.count().undelivered; n > 0 {
		log.Printf(notice+"ending: waits for the monitor to take %s, at most %v", plural(n, "reading"), deliverTime)
	}
	within(deliverTime, a.delivery.close)
}

// within calls f with a context that ends after d.
func within(d time.Duration, f func(context.Context)) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	f(ctx)
}

// goBeside starts a goroutine that run waits for.
func (a *agent) goBeside(f func()) {
	a.beside.Add(1)
	go func() { defer a.beside.Done(); f() }()
}

// greet calls the monitor's healthcheck and logs what comes of it. Nothing else
// follows: whether readings arrive is seen when there are some.
func (a *agent) greet() {
	monitor := a.delivery.monitor()
	switch err := wrongScheme(a.ctx, monitor.url, checkHealth(a.ctx, monitor)); {
	case a.ctx.Err() != nil: // the agent ends
	case err != nil:
		log.Printf(warning+"monitor %s: healthcheck: %s", masked(monitor.url.String()), oneLine(err.Error()))
	default:
		log.Printf("monitor %s: answers", masked(monitor.url.String()))
	}
}

// wrongScheme returns the error of a call or, if the URL is http and the peer speaks
// TLS, or the other way round, an error that says so. To find out it begins a TLS
// connection to a peer whose answer over plain HTTP made no sense, and sends nothing.
func wrongScheme(ctx context.Context, u *url.URL, err error) error {
	switch answered := (*fault)(nil); {
	case errors.Is(err, http.ErrSchemeMismatch):
		return errors.New("it speaks plain HTTP there, no TLS: its URL begins with http://")
	case err == nil || u.Scheme != "http" || errors.As(err, &answered):
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, helloTime)
	defer cancel()
	host := u.Host
	if u.Port() == "" {
		host = net.JoinHostPort(u.Hostname(), "http")
	}
	dialer := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} // whoever it is
	conn, errHello := dialer.DialContext(ctx, "tcp", host)
	if errHello != nil {
		return err
	}
	conn.Close()
	return errors.New("it speaks TLS there, no plain HTTP: its URL begins with https://")
}

// logWarnings logs what is allowed, but perhaps not meant.
func (a *agent) logWarnings() {
	now := a.active.Load()
	for _, text := range append(now.sensors.warnings(), now.updater.ownerWarning()) {
		if text != "" {
			log.Print(warning + text)
		}
	}
	if len(now.settings.allow) == 0 && now.settings.agentTLS.ca == "" {
		log.Printf(notice+"[agent] allow is empty: whoever reaches %s can command the agent", a.listener.Addr())
	}
}

// reload reads client.cfg again. If all is valid it comes into force, else nothing changes.
// Commands that wait, sensors that run and undelivered readings are not touched.
func (a *agent) reload() {
	a.changing.Lock()
	defer a.changing.Unlock()
	before := a.active.Load()
	s, err := rereadSettings(a.ctx, before.settings)
	if a.ctx.Err() != nil {
		return // the agent ends
	}
	if err != nil {
		for _, line := range strings.Split(masked(err.Error())+"\nthe settings before stay in force", "\n") {
			log.Printf(severe+"reload: %s", line)
		}
		return
	}
	if was := before.settings; s.listen != was.listen || s.spool != was.spool || s.spoolSize != was.spoolSize {
		log.Print(notice + "reload: [agent] listen, [monitor] spool and spool_size are in force at the next start")
	}
	now := activate(s)
	now.sensors.runState = before.sensors.runState
	a.active.Store(now)
	a.queue.resize(s.concurrency, s.queue)
	a.handler.setAccess(&access{s.allow, serverTLS(s.agentTLS)})
	a.delivery.configure(monitorOf(s))
	a.applied(s)
	log.Printf(notice+"reload: %s is in force; monitor %s", s.file, masked(s.monitor.String()))
	a.logWarnings()
	a.goBeside(a.greet)
}

// rereadSettings returns the settings of client.cfg when two reads, a second apart, are equal:
// it may be half written. It refuses settings that lack a protection which is in force.
func rereadSettings(ctx context.Context, before *settings) (s *settings, err error) {
	text, err := readSmall(before.file, maxConfig)
	for same := false; err == nil && !same; {
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
		s, err = checkSettings(c, wrong)
	}
	if err != nil {
		return s, err
	}
	if lost := before.lost(s); len(lost) > 0 {
		err = fmt.Errorf("%s: it lacks %s: a reload gives up no protection that is in force, only a start does",
			before.file, strings.Join(lost, ", "))
	}
	return s, err
}

// health lists what the agent can be asked. A value less than 0 is not known.
var health = []struct {
	name, help string
	value      func(*agent) int
}{
	{"uptime", "seconds since the agent started", func(a *agent) int { return seconds(a.started) }},
	{"queued", "commands that wait", func(a *agent) int { return a.queue.count() }},
	{"running", "sensors that run", func(a *agent) int { return a.active.Load().sensors.running() }},
	{"undelivered", "readings that the monitor does not have yet",
		func(a *agent) int { return a.delivery.count().undelivered }},
	{"delivered", "readings delivered since the start", func(a *agent) int { return a.delivery.count().delivered }},
	{"dropped", "readings given up since the start", func(a *agent) int { return a.delivery.count().dropped }},
	{"refused", "calls refused since the start", func(a *agent) int { return int(a.handler.count.Load()) }},
	{"rss_kb", "resident memory in KiB", func(*agent) int { return residentKiB() }},
	{"spool_bytes", "size of the spool", func(a *agent) int { return int(a.delivery.count().spoolBytes) }},
	{"last_delivery_age", "seconds since the latest delivery, or the start",
		func(a *agent) int { return seconds(a.delivery.count().latest) }},
}

func seconds(since time.Time) int { return int(time.Since(since).Seconds()) }

// residentKiB returns the resident memory of this process, -1 without a /proc. (The
// scanner of fmt would make the binary 52 KiB larger.)
func residentKiB() int {
	text, _ := os.ReadFile("/proc/self/statm") // in pages: all, resident, ...
	words := strings.Fields(string(text) + " - -")
	pages, err := strconv.Atoi(words[1])
	if err != nil {
		return -1
	}
	return pages * (os.Getpagesize() >> 10)
}

// ownReading returns a reading of the agent itself.
func (a *agent) ownReading(args []string) reading {
	for _, h := range health {
		if len(args) != 1 || args[0] != h.name {
			continue
		}
		if value := h.value(a); value >= 0 {
			return reading{value: strconv.Itoa(value)}
		}
		return reading{code: exitFailed, reason: h.name + " is not known: is there a /proc?"}
	}
	return reading{code: exitUsage, reason: "takes one of its options, not " + cut(strings.Join(args, " "))}
}

// ownHelp returns the help text of the sensor that is the agent itself.
func ownHelp() string {
	text := ""
	for _, h := range health {
		text += fmt.Sprintf("%-18s %s\n", h.name, h.help)
	}
	return strings.TrimSpace(text)
}

// healthLine returns the agent's health in one line.
func (a *agent) healthLine() string {
	line := "health:"
	for _, h := range health {
		line += fmt.Sprint(" ", h.name, " ", h.value(a))
	}
	return line
}

// commands returns the methods that the monitor can call, besides those of introspection.
func (a *agent) commands() []method {
	const done = " Returns OK at once; stores exit code 0 and value 1 when it is done."
	const changed = "string string, string string int, string string string"
	return []method{
		{"cmd_list_sensors", "struct", "cmd_list_sensors(): the help text of each sensor, by its name.", a.listSensors},
		{"healthcheck", "string", "healthcheck(): OK.", healthcheck},
		a.submits("cmd_submit_reading", "", "ticket, sensor, [arguments]",
			"string int string, string int string array, string int string string, "+
				"string i8 string, string i8 string array, string i8 string string, "+
				"string string string, string string string array, string string string string",
			"runs a sensor and stores the reading at the monitor with cmd_store_probe_data. Returns OK at once."),
		a.submits("cmd_update_sensor_code", "update", "sensor, [ticket]", changed,
			"fetches the sensor's package with cmd_get_sensor_code, tries it and installs it."+done),
		a.submits("cmd_rollback_sensor_code", "rollback", "sensor, [ticket]", changed,
			"puts the newest backup of the sensor back in its place."+done),
		a.submits("cmd_register_new_server", "move", "[ticket]", "string, string int, string string",
			"asks for another monitor with cmd_get_new_monitor_url, and moves there if its healthcheck answers OK."+done),
	}
}

// submits returns the method that makes a command of its parameters and accepts it.
// takes names the parameters in order; those that may be missing have brackets.
func (a *agent) submits(name, change, takes, signatures, help string) method {
	names := strings.Split(takes, ", ")
	submit := func(r request, params []any) (any, error) {
		c, err := command{change: change}, error(nil)
		for i := 0; i < len(params) && err == nil; i++ {
			switch v := params[i]; names[i] {
			case "sensor":
				c.sensor, err = sensorName(v)
			case "[arguments]":
				c.args, err = arguments(v)
			default:
				if v != nil || names[i] == "ticket" {
					c.ticket, err = ticketOf(v)
				}
			}
		}
		if err != nil {
			return nil, faultf(faultParams, "%s: %v", name, err)
		}
		return a.accept(r, name, c)
	}
	return method{name, signatures, fmt.Sprintf("%s(%s): %s", name, takes, help), submit}
}

// accept puts a command into the queue. Where that is full it waits for room, as
// long as one run can take, or until the monitor has taken no reading for so long.
func (a *agent) accept(r request, name string, c command) (any, error) {
	now := a.active.Load().settings
	if now.verbose {
		a.events.printf("command %s from %s: %s, %s", name, r.peer, ticketText(c.ticket), c)
	}
	c.from = limitKey(r.peer)
	longest, waits := now.longest()+2*killTime, r.received
	if since := a.delivery.stalledSince(); !since.IsZero() && since.Before(waits) {
		waits = since
	}
	return "OK", a.queue.accept(r.ctx, c, waits.Add(longest))
}

// runCommand does what a command in the queue asks, and returns its reading.
func (a *agent) runCommand(ctx context.Context, c command) reading {
	a.delivery.waitRoom(ctx)
	if c.change != "" {
		return a.makeChange(ctx, c)
	}
	begun, now := time.Now(), a.active.Load()
	var r reading
	if c.sensor == ownSensor {
		r = a.ownReading(c.args)
	} else {
		r = now.sensors.read(ctx, c.sensor, c.args, nil)
	}
	if r.code != 0 || now.settings.verbose {
		line := fmt.Sprintf("%s: exit %d in %v: %s", c, r.code, time.Since(begun).Round(time.Millisecond), r.reason)
		a.events.printf("%s", strings.TrimSuffix(line, ": "))
	}
	return r
}

// makeChange makes a change and returns its outcome as a reading.
func (a *agent) makeChange(ctx context.Context, c command) reading {
	begun := time.Now()
	err := a.change(ctx, c)
	a.noteChange(c, err)
	if err != nil {
		a.events.printf(warning+"%s: %s", c, oneLine(masked(err.Error())))
		return reading{code: exitFailed, reason: err.Error()}
	}
	log.Printf(notice+"%s: done in %v", c, time.Since(begun).Round(time.Millisecond))
	debug.FreeOSMemory() // decompression took more than anything else does
	return reading{value: "1"}
}

// noteChange notes for cmd_list_sensors why the latest change of a sensor failed, as long as
// the sensor is installed. A failed move is noted under "", which is no sensor.
func (a *agent) noteChange(c command, err error) {
	a.failedMu.Lock()
	defer a.failedMu.Unlock()
	delete(a.failed, c.sensor)
	if err != nil && c.sensor != ownSensor {
		a.failed[c.sensor] = oneLine(masked(err.Error()))
	}
	path := a.active.Load().sensors.path
	maps.DeleteFunc(a.failed, func(name, _ string) bool { return !exists(filepath.Join(path, name)) })
}

// change changes a sensor or the agent's monitor. An error means that nothing has changed.
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

// move changes the monitor to the one that the present monitor names: first in
// client.cfg, then for all readings that are not delivered yet.
func (a *agent) move(ctx context.Context) error {
	present := a.delivery.monitor()
	u, err := nextMonitor(ctx, present, httpURL)
	if err != nil {
		return err
	}
	lock := sync.OnceFunc(a.changing.Lock) // after the lock of client.cfg, so that no reload waits for that
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
	now := a.active.Load()
	s := *now.settings
	s.monitor = u
	a.active.Store(&active{&s, now.sensors, now.updater})
	a.delivery.configure(monitorOf(&s))
	log.Printf(notice+"move: from now on the monitor is %s", masked(u.String()))
	return nil
}

func (a *agent) listSensors(request, []any) (any, error) {
	texts, err := a.active.Load().sensors.helpTexts(a.ctx) // also for a caller that has closed its sending half
	if a.ctx.Err() != nil {
		return nil, faultf(faultBusy, "the agent is shutting down")
	}
	if err != nil {
		a.handler.refused.printf(warning+"%v", err) // the list has the agent's own text alone
		texts = make(map[string]string)
	}
	texts[ownSensor] = ownHelp()
	a.failedMu.Lock()
	listed := fitHelps(texts, a.failed)
	a.failedMu.Unlock()
	if left := len(texts) - len(listed); left > 0 {
		a.handler.refused.printf(warning+"cmd_list_sensors: %s left out: the answer is full", plural(left, "sensor"))
	}
	return listed, nil
}

func healthcheck(request, []any) (any, error) { return "OK", nil }

func runCheck(ctx context.Context, in *invocation) error {
	name, args := in.args[0], in.args[1:]
	asksHelp := len(args) == 1 && args[0] == in.settings.help
	if name == ownSensor && asksHelp {
		fmt.Fprintln(in.out, ownHelp())
		return nil
	}
	if err := checkOnDisk(name); err != nil {
		return err
	}
	s := activate(in.settings).sensors
	var r reading
	if asksHelp {
		r = s.of(name).runIn(ctx, filepath.Join(s.path, name), name, args, os.Stderr)
	} else if r = s.read(ctx, name, args, os.Stderr); r.value == "" {
		r.value = in.settings.noValue
	}
	fmt.Fprintln(in.out, strings.TrimSpace(r.value))
	if r.code == 0 {
		return nil
	}
	failed := &exitError{code: r.code}
	if r.code < 0 {
		failed.code = 128 - r.code // as a shell shows a signal
	}
	if r.reason != "" {
		failed.error = fmt.Errorf("sensor %s: %s", name, r.reason)
	}
	return failed
}

func runList(ctx context.Context, in *invocation) error {
	sensors := activate(in.settings).sensors
	texts, err := sensors.helpTexts(ctx)
	if err != nil {
		return err
	}
	_, missing, _ := sensors.found()
	for _, line := range missing {
		log.Print(warning + line)
	}
	if len(texts) == 0 {
		return errors.New(strings.Join(sensors.warnings(), "\n"))
	}
	texts[ownSensor] = ownHelp()
	for _, name := range sortedKeys(texts) {
		fmt.Fprintf(in.out, "%s\n  %s\n", name, strings.ReplaceAll(texts[name], "\n", "\n  "))
	}
	return nil
}

// checkOnDisk refuses a name that cannot be that of a sensor's directory.
func checkOnDisk(name string) error {
	if name == ownSensor {
		return usagef("the sensor %s is the agent itself: the monitor asks the running one for its health "+
			"with cmd_submit_reading; to have it in the log, type: kill -USR1 $(pidof picket)", ownSensor)
	}
	if _, err := sensorName(name); err != nil {
		return usagef("%w; type: picket list", err)
	}
	return nil
}

// runChange changes a sensor on the box: by update, rollback or install.
func runChange(ctx context.Context, in *invocation) error {
	verb, name := in.command.name, in.args[0]
	c, _, _ := monitorOf(in.settings)
	defer c.close()
	from := fromMonitor(c, name, in.settings.maxPackage)
	if verb == "install" {
		from, name = fromFile(name), filepath.Base(name)
		for _, suffix := range []string{".bz2", ".gz", ".tar", ".tbz2", ".tgz"} {
			name = strings.TrimSuffix(name, suffix)
		}
	}
	err := checkOnDisk(name)
	if err != nil {
		return err
	}
	if u := activate(in.settings).updater; verb == "rollback" {
		err = u.rollback(ctx, name)
	} else {
		err = u.install(ctx, name, from)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", verb, name, err)
	}
	fmt.Fprintf(in.out, "%s %s: done\n", verb, name)
	return nil
}

// runConfig prints each option as INI, with its value or default, but without passwords.
func runConfig(_ context.Context, in *invocation) error {
	c := in.ini
	s, err := checkSettings(c, mistake)
	if err != nil {
		return err
	}
	for _, text := range activate(s).sensors.warnings() {
		log.Print(warning + text)
	}
	effective, _ := parseINI(c.name, "") // no error: there is no line
	for _, o := range c.options(s) {
		value, _ := c.get(o.section, o.name) // no error: it was checked
		if err := effective.set(o.section, o.name, redacted(value)); err != nil {
			return err
		}
	}
	fmt.Fprintf(in.out, "# %s; paths start from its directory\n%s", c.name, effective.text)
	return nil
}

func runConfigGet(_ context.Context, in *invocation) error {
	section, name := in.args[0], in.args[1]
	if text, _ := unknown(section, name); text != "" {
		return usagef("%s", text)
	}
	value, err := in.ini.get(section, name)
	if err != nil {
		return usagef("%v", in.ini.finding(section, name, err))
	}
	fmt.Fprintln(in.out, redacted(value))
	return nil
}

// runConfigEdit sets or unsets options of client.cfg. It refuses a change that leads to
// a mistake which was not there before, or to any finding about what it sets.
func runConfigEdit(ctx context.Context, in *invocation) error {
	sets := in.command.name == "config set"
	return editINI(ctx, in.ini.name, func(c *ini) (err error) {
		_, before := checkAll(c)
		var named []iniKey // the options and sections that it sets
		if !sets {
			err = c.remove(in.args[0], in.args[1:]...)
		}
		for args := in.args; sets && len(args) > 0 && err == nil; args = args[3:] {
			named = append(named, iniKey{args[0], ""}, iniKey{args[0], strings.ToLower(args[1])})
			err = c.set(args[0], args[1], args[2])
		}
		if err != nil {
			return err
		}
		_, after := checkAll(c)
		var refused []error
		for _, f := range after {
			wasThere := slices.ContainsFunc(before, func(b finding) bool { return b.at == f.at && b.grave >= f.grave })
			if slices.Contains(named, f.at) || !wasThere && f.grave >= mistake {
				refused = append(refused, errors.New(f.text)) // without a line: it is not in the file
			}
		}
		if len(refused) > 0 {
			return usagef("not changed: %w", errors.Join(refused...))
		}
		return nil
	})
}

// loadTLS reads the files that the flags -ca, -cert and -key name, with this prefix. Its
// error names the flag.
func (in *invocation) loadTLS(prefix string) (t tlsFiles, err error) {
	t.ca, t.certificate, t.key = *in.flags[prefix+"ca"], *in.flags[prefix+"cert"], *in.flags[prefix+"key"]
	option, err := t.load()
	if err != nil {
		err = in.usageError("-%s%s: %w", prefix, strings.TrimSuffix(option, "ificate"), err)
	}
	return t, err
}

func runCall(ctx context.Context, in *invocation) error {
	u, err := httpURL(in.args[0])
	if err != nil {
		return in.usageError("%w", err)
	}
	files, err := in.loadTLS("")
	if err != nil {
		return err
	}
	c := newClient(u, time.Minute, clientTLS(files))
	defer c.close()
	v, err := c.call(ctx, in.args[1], wireValues(in.args[2:])...)
	if err != nil {
		return fmt.Errorf("call %s: %w", u, wrongScheme(ctx, u, err)) // execute masks a password
	}
	fmt.Fprintln(in.out, readable(v))
	return nil
}

// wireValues returns words as values: a whole number as int, anything else as a string.
func wireValues(words []string) (values []any) {
	for _, word := range words {
		if n, err := strconv.ParseInt(word, 10, 32); err == nil {
			values = append(values, int(n))
		} else {
			values = append(values, word)
		}
	}
	return values
}

// readable returns a value for people: a struct as one line for each member.
func readable(v any) string {
	switch v := v.(type) {
	case []byte:
		return base64.StdEncoding.EncodeToString(v)
	case map[string]any:
		var lines []string
		for _, name := range sortedKeys(v) {
			lines = append(lines, strings.ReplaceAll(name+": "+readable(v[name]), "\n", "\n  "))
		}
		return strings.Join(lines, "\n")
	}
	return fmt.Sprint(v)
}

func runMonitor(ctx context.Context, in *invocation) error {
	m := &monitor{packages: *in.flags["packages"], next: *in.flags["next"]}
	if _, err := httpURL(m.next); m.next != "" && err != nil {
		return in.usageError("-next: %w", err)
	}
	if _, err := os.ReadDir(m.packages); m.packages != "" && err != nil {
		return in.usageError("-packages: %w", err)
	}
	if *in.flags["ca"] != "" && *in.flags["cert"] == "" { // it would check nobody
		return in.usageError("-ca: needs -cert and -key")
	}
	files, err := in.loadTLS("")
	agentFiles, errAgent := in.loadTLS("agent-")
	if err := errors.Join(err, errAgent); err != nil {
		return err
	}
	h, scheme := newHandler(m.methods()), "http"
	if rules := serverTLS(files); rules != nil {
		h.setAccess(&access{tls: rules})
		scheme = "https"
	}
	p, probe := newProber(clientTLS(agentFiles), in.out), *in.flags["probe"]
	p.host, _, _ = net.SplitHostPort(probe) // Listen says what is wrong with it
	m.stored = p.stored
	ended := make(chan error, 2)
	serve := func(h *handler, flag, line string) {
		listener, err := net.Listen("tcp", *in.flags[flag])
		if err != nil {
			ended <- fmt.Errorf("-%s: %w", flag, err)
			return
		}
		if h.most == maxConns { // else the process may have few files open
			h.most = monitorConns
		}
		log.Printf(line, listener.Addr())
		go func() { ended <- h.serve(listener) }()
	}
	defer h.http.Close()
	defer p.handler.http.Close()
	serve(h, "listen", "monitor on "+scheme+"://%s/xmlrpc/")
	if probe != "" {
		serve(p.handler, "probe", "probes on http://%s/")
	}
	select {
	case err = <-ended:
	case <-ctx.Done():
	}
	return err
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

// A monitor stands in for the real one in labs, in tests and beside Prometheus.
type monitor struct {
	packages string                    // the directory that holds SENSOR.tar.bz2; "" serves none
	next     string                    // the URL that agents move to; "" is none
	stored   func(storedReading) error // is called for each reading, perhaps for several at once
}

func (m *monitor) methods() []method {
	return []method{
		{"cmd_store_probe_data", "string int array dateTime.iso8601",
			"Takes a reading: ticket, [exit code, value], time.", m.store},
		{"cmd_get_sensor_code", "base64 string", "The package of a sensor.",
			func(_ request, params []any) (any, error) { return m.file(params, ".tar.bz2") }},
		{"cmd_get_sensor_signature", "base64 string", "The signature of a sensor's package.",
			func(_ request, params []any) (any, error) { return m.file(params, ".tar.bz2.sig") }},
		{"cmd_get_new_monitor_url", "string string", "The URL of the monitor that a host moves to.", m.nextURL},
		{"healthcheck", "string", "OK.", healthcheck},
	}
}

func (m *monitor) store(r request, params []any) (any, error) {
	ticket, err := ticketOf(params[0])
	pair, _ := params[1].([]any)
	if at, isTime := params[2].(dateTime); err == nil && len(pair) == 2 && isTime {
		code, isInt := pair[0].(int)
		if value, isString := pair[1].(string); isInt && isString {
			return "OK", m.stored(storedReading{at, r.peer, ticket, code, value})
		}
	}
	return nil, faultf(faultParams,
		"cmd_store_probe_data takes ticket, [exit code as int, value as string], time as dateTime.iso8601")
}

// file returns the content of the file that a sensor's name and a suffix make.
func (m *monitor) file(params []any, suffix string) (any, error) {
	name, err := sensorName(params[0])
	var data []byte
	switch {
	case m.packages == "":
		err = errors.New("this monitor serves no packages")
	case err == nil:
		data, err = readSmall(filepath.Join(m.packages, name+suffix), maxServed)
	}
	if err != nil {
		return nil, faultf(faultParams, "%v", err)
	}
	return data, nil
}

func (m *monitor) nextURL(request, []any) (any, error) {
	if m.next == "" {
		return nil, faultf(faultParams, "there is no new monitor")
	}
	return m.next, nil
}

// A prober answers Prometheus. For each scrape it has a box take readings, and waits for
// them. A probe takes one connection, so there are at most monitorConns at once.
type prober struct {
	handler *handler    // for its limits of HTTP; it answers no XML-RPC
	tls     *tls.Config // the rules for calls of agents
	out     *log.Logger // gets the readings that no probe waits for
	host    string      // of -probe
	prefix  string      // begins its tickets, and none of an earlier start

	mu      sync.Mutex            // guards what is below
	waiting map[string]*probeRead // those whose readings have not come, by ticket
	counts  map[string]int        // of readings and probes, by result
}

func newProber(tls *tls.Config, out io.Writer) *prober {
	p := &prober{handler: newHandler(nil), tls: tls, out: log.New(out, "", 0)}
	p.prefix = fmt.Sprintf("%s%x-", probeTicket, time.Now().UnixNano())
	p.waiting, p.counts = make(map[string]*probeRead), make(map[string]int)
	p.handler.http.Handler = p
	return p
}

// ServeHTTP answers one request.
func (p *prober) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.handler.setWorking(r, true)
	defer p.handler.setWorking(r, false)
	control := http.NewResponseController(w)
	control.SetReadDeadline(time.Time{}) // else it would end the probe
	status, kind, text := http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", ""
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		status, text = http.StatusMethodNotAllowed, "Use GET.\n"
	case r.Header.Get("Sec-Fetch-Site") == "cross-site", !p.isOwnHost(r.Host): // a web page in a browser here
		status, text = http.StatusForbidden, "Use an address or the host of -probe, and no page of another site.\n"
	case r.URL.Path == "/probe":
		status, text = p.answer(r)
	case r.URL.Path == "/metrics":
		text = p.metrics()
	case r.URL.Path == "/":
		kind, text = "text/html; charset=utf-8", probePage
	default:
		status, text = http.StatusNotFound, "There are /, /probe and /metrics.\n"
	}
	control.SetWriteDeadline(time.Now().Add(writeTimeout))
	w.Header().Set("Content-Type", kind)
	w.WriteHeader(status)
	io.WriteString(w, text) // an error means that the peer has gone
}

// isOwnHost reports whether a request for this host may be answered: an address,
// localhost or the host of -probe. A request for any other may come from a web page
// whose owner has made the name of his host lead here.
func (p *prober) isOwnHost(host string) bool {
	name := (&url.URL{Host: host}).Hostname()
	_, err := netip.ParseAddr(name)
	return err == nil || name == "" || name == "localhost" || name == p.host
}

const probePage = `<!DOCTYPE html>
<title>picket monitor</title>
<h1>picket monitor</h1>
<p>Prometheus asks <code>/probe</code> for readings of a box, and <a href="/metrics">/metrics</a> for how that goes.</p>
<form action="/probe">
<p><label>Box: HOST, HOST:PORT or URL <input name="target" required></label></p>
<p><label>Sensor and arguments <input name="read" value="disk percent /" required></label></p>
<p><button>Probe</button></p>
</form>
`

// A probe is what one scrape asks for.
type probe struct {
	target *url.URL
	reads  []*probeRead
	wait   time.Duration // for all of it
}

// A probeRead is one reading that a probe asks for.
type probeRead struct {
	sensor, args, ticket string
	arrived              chan storedReading // gets the reading, or is closed when nobody waits for it
}

// parseProbe returns the probe that a request describes.
func parseProbe(r *http.Request) (p probe, err error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	targets, reads := query["target"], query["read"]
	switch {
	case err != nil:
		return p, err
	case len(targets) != 1:
		return p, fmt.Errorf("target: got %d; want one", len(targets))
	case len(reads) == 0 || len(reads) > maxReads:
		return p, fmt.Errorf("read: got %d; want 1 to %d", len(reads), maxReads)
	}
	if p.target, err = probeTarget(targets[0]); err != nil {
		return p, fmt.Errorf("target: %w", err)
	}
	for _, text := range reads {
		sensor, args, _ := strings.Cut(strings.TrimSpace(text), " ")
		read := &probeRead{sensor: sensor, args: strings.TrimSpace(args)}
		if _, err = sensorName(sensor); err == nil {
			_, err = arguments(args)
		}
		notPlain := func(r rune) bool { return r == unicode.ReplacementChar || !unicode.IsPrint(r) }
		switch {
		case err != nil:
			return p, fmt.Errorf("read: %w", err)
		case strings.ContainsFunc(args, notPlain):
			return p, fmt.Errorf("read: %s is not plain text", cut(args))
		case slices.ContainsFunc(p.reads, func(r *probeRead) bool { return r.sensor == read.sensor && r.args == read.args }):
			return p, fmt.Errorf("read: %s comes twice", cut(text))
		}
		p.reads = append(p.reads, read)
	}
	p.wait = probeWait
	if timeout := r.Header.Get("X-Prometheus-Scrape-Timeout-Seconds"); timeout != "" {
		s, err := parseDecimal(timeout)
		if err != nil || s <= 0 || s > maxScrape.Seconds() {
			return p, fmt.Errorf("scrape timeout: %s is not a number of seconds, %v at most", cut(timeout), maxScrape)
		}
		p.wait = time.Duration(max(s/2, s-0.5) * float64(time.Second)) // the answer comes before that
	}
	return p, nil
}

// probeTarget takes HOST, HOST:PORT or a URL. It adds port 8080 and path /xmlrpc/ if missing.
func probeTarget(v string) (*url.URL, error) {
	if !strings.Contains(v, "://") {
		v = "http://" + v
	}
	u, err := httpURL(v)
	if err == nil && u.Port() == "" {
		u.Host = net.JoinHostPort(u.Hostname(), "8080")
	}
	if err == nil && u.Path == "" {
		u.Path = "/xmlrpc/"
	}
	return u, err
}

// answer makes the probe that a request describes. It returns an HTTP status and metrics.
func (p *prober) answer(r *http.Request) (status int, text string) {
	begun := time.Now()
	probe, err := parseProbe(r)
	if err != nil {
		p.count("bad_request")
		return http.StatusBadRequest, oneLine(masked(err.Error())) + "\n"
	}
	codes, values, err := p.take(r.Context(), probe)
	success, result := " 1", "ok"
	if err != nil {
		success, result = " 0", "failed"
		text = "# failed: " + oneLine(probe.target.Host+": "+masked(err.Error())) + "\n"
	}
	p.count(result)
	return http.StatusOK, text +
		family("probe_success", "gauge", "Whether every reading came in time.", success) +
		family("probe_duration_seconds", "gauge", "How long the probe took.",
			fmt.Sprintf(" %.6f", time.Since(begun).Seconds())) +
		family("picket_exit_code", "gauge", "The exit code of the sensor; 0 is success.", codes...) +
		family("picket_reading", "gauge", "The number that the sensor printed.", values...)
}

// take asks a box for the readings and waits for them. It returns samples of their exit
// codes and of their numbers. Its error says why some readings do not come.
func (p *prober) take(ctx context.Context, probe probe) (codes, values []string, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, probe.wait, fmt.Errorf("no answer in %v", probe.wait))
	defer cancel()
	c := newClient(probe.target, probe.wait, p.tls)
	defer c.close()
	p.expect(probe.reads) // before they can come
	defer context.AfterFunc(ctx, func() { p.forget(probe.reads) })()
	for i, read := range probe.reads {
		if _, err = c.call(ctx, "cmd_submit_reading", read.ticket, read.sensor, read.args); err != nil {
			err = wrongScheme(ctx, probe.target, err)
			p.forget(probe.reads[i:]) // the box is away or busy
			break
		}
	}
	for _, read := range probe.reads {
		if r, came := <-read.arrived; came {
			labels, value := fmt.Sprintf("{sensor=%q,args=%q} ", read.sensor, read.args), strings.TrimSpace(r.value)
			codes = append(codes, fmt.Sprint(labels, r.code))
			if _, err := parseDecimal(value); err == nil {
				values = append(values, labels+value)
			}
		} else if err == nil {
			what := cut(strings.TrimSpace(read.sensor + " " + read.args))
			err = fmt.Errorf("no reading of %s in %v: does the [monitor] url of the box lead here?", what, probe.wait)
		}
	}
	return codes, values, err
}

// expect gives tickets that nobody can guess to readings that are to come.
func (p *prober) expect(reads []*probeRead) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, read := range reads {
		secret := make([]byte, 16)
		if _, err := rand.Read(secret); err != nil {
			panic(err) // no ticket is better than one that can be guessed
		}
		read.ticket, read.arrived = fmt.Sprintf("%s%x", p.prefix, secret), make(chan storedReading, 1)
		p.waiting[read.ticket] = read
	}
}

// forget ends the wait for readings. Those that come later are late.
func (p *prober) forget(reads []*probeRead) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, read := range reads {
		if p.waiting[read.ticket] != nil {
			delete(p.waiting, read.ticket)
			close(read.arrived)
		}
	}
}

// stored passes a reading on to the probe that waits for it. It prints any other, which
// holds up no probe: whoever reads the output may have stopped.
func (p *prober) stored(r storedReading) error {
	ticket, _ := r.ticket.(string)
	p.mu.Lock()
	read, result, remark := p.waiting[ticket], "stored", ""
	switch {
	case read != nil:
		delete(p.waiting, ticket)
		read.arrived <- r // which has room for it
	case strings.HasPrefix(ticket, p.prefix):
		result, remark = "late", ", late"
	case strings.HasPrefix(ticket, probeTicket):
		result, remark = "unknown", ", unknown"
	}
	p.counts[result]++
	p.mu.Unlock()
	if read != nil {
		return nil
	}
	return p.out.Output(0, r.String()+remark)
}

func (p *prober) count(result string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counts[result]++
}

// metrics returns the prober's own metrics.
func (p *prober) metrics() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	counted := func(name, help string, results ...string) string {
		for i, result := range results {
			results[i] = fmt.Sprintf("{result=%q} %d", result, p.counts[result])
		}
		return family(name, "counter", help, results...)
	}
	return counted("picket_monitor_readings_total", "Readings, by whether a probe that is over or not known "+
		"had asked for them.", "stored", "late", "unknown") +
		counted("picket_monitor_probes_total", "Probes, by result.", "ok", "failed", "bad_request") +
		family("picket_build_info", "gauge", "The version of this monitor.", fmt.Sprintf("{version=%q} 1", version))
}

// family returns the samples of a metric in Prometheus's text format.
func family(name, kind, help string, samples ...string) string {
	text := fmt.Sprintf("# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	for _, sample := range samples {
		text += name + sample + "\n"
	}
	return text
}

// selfFiles returns what the selftest's agent and monitor have: sensors that behave
// and misbehave, and packages of newer versions of two of them, as tar and bzip2
// make them. To read one: echo TEXT | base64 -d | tar xjO
func selfFiles() map[string]string {
	good, _ := base64.StdEncoding.DecodeString(
		"QlpoOTFBWSZTWYEZB0EAADPbgcqQaADfgAEAfumeAAAAiAggAFQ1ENMjTQaB6QGnlBKSaDTQNABo" +
			"0GnDYqUFEogVwcwW1k6AoLnrg6N7+8WiMUIbSIUFfru2LATnLH0h4IlohzE1mxpm9LEwUr8XckU4UJCBGQdB")
	garbage, _ := base64.StdEncoding.DecodeString(
		"QlpoOTFBWSZTWVyoZLIAADRbgMqQaAD6gAgAeukeQEgIIABUVqYmmNQepgQaD0EopoNNGjQAGhpu" +
			"6SqFU4gW9QaMc2lAUGcMjfKHMcXCNUQ2mQGlGMmtO9Wh0Vp8oJUqnb70TT/igTVkehAFxdyRThQkFyoZLIA=")
	return map[string]string{
		"client.cfg":               "[sensor]\ntimeout = 2\n[agent]\nlisten = 127.0.0.1:0\n",
		"sensors/good/check":       "#!/bin/sh\necho 42\n",
		"sensors/failing/check":    "#!/bin/sh\necho no such thing >&2; exit 3\n",
		"sensors/hanging/check":    "#!/bin/sh\nsleep 60\n",
		"sensors/garbage/check":    "#!/bin/sh\necho hello\n",
		"packages/good.tar.bz2":    string(good),    // good/check prints 43
		"packages/garbage.tar.bz2": string(garbage), // garbage/check exits with 1
	}
}

// selfSteps lists the calls that the selftest makes, and what its monitor must get then.
var selfSteps = []struct{ call, want string }{
	{"cmd_submit_reading 1 good", "ticket 1: exit 0, value 42"},
	{"cmd_submit_reading 2 failing", "ticket 2: exit 3, value nan"},
	{"cmd_submit_reading 3 hanging", "ticket 3: exit -15, value nan"},
	{"cmd_submit_reading 4 garbage", "ticket 4: exit 65, value nan"},
	{"cmd_update_sensor_code good 5", "ticket 5: exit 0, value 1"},
	{"cmd_submit_reading 6 good", "ticket 6: exit 0, value 43"},
	{"cmd_update_sensor_code garbage 7", "ticket 7: exit 1, value nan"}, // a package whose trial fails
	{"cmd_submit_reading 8 garbage", "ticket 8: exit 65, value nan"},
	{"cmd_rollback_sensor_code good 9", "ticket 9: exit 0, value 1"},
	{"cmd_submit_reading 10 good", "ticket 10: exit 0, value 42"},
	{"cmd_register_new_server 11", "ticket 11: exit 0, value 1"},
	{"cmd_submit_reading 12 good", "ticket 12: exit 0, value 42"},
}

// A selftest prints a row for each thing that it tries.
type selftest struct {
	out    io.Writer
	failed int
}

const failed = "FAILED"

func (t *selftest) row(verdict, what, outcome string) {
	if verdict == failed {
		t.failed++
	}
	fmt.Fprintf(t.out, "%-7s %-32s %s\n", verdict, what, outcome)
}

// runSelftest goes through selfSteps, then takes a reading from each installed sensor.
func runSelftest(ctx context.Context, in *invocation) error {
	leaveTerminal()
	s, err := readSettings(*in.flags["c"]) // nil without a client.cfg
	if err != nil && !errors.Is(err, errNoConfig) {
		return err
	}
	dir, err := os.MkdirTemp("", "picket-selftest-")
	if err != nil {
		return fmt.Errorf("selftest: %w; set TMPDIR to a directory that is there", err)
	}
	defer os.RemoveAll(dir)
	var lines bytes.Buffer // of the log, shown only where something failed
	before := log.Writer()
	log.SetOutput(&logWriter{plain: &lines})
	fmt.Fprintf(in.out, "picket %s in %s\n", version, dir)
	t := &selftest{out: in.out}
	if err = t.testAgent(ctx, dir, s); err == nil && s != nil {
		err = t.testInstalled(ctx, activate(s).sensors)
	}
	log.SetOutput(before)
	if err == nil && t.failed > 0 {
		err = fmt.Errorf("%s not as it should be", plural(t.failed, "thing"))
	}
	if err != nil {
		fmt.Fprintf(in.out, "\nlog:\n  %s\n", strings.ReplaceAll(strings.TrimSpace(lines.String()), "\n", "\n  "))
		return fmt.Errorf("selftest: %w", err)
	}
	fmt.Fprintln(in.out, "selftest passed")
	return nil
}

// testAgent starts an agent with selfFiles and a stand-in for its monitor, both on loopback,
// and gives the agent the commands of selfSteps. Its sensors run as the user of the installed ones.
func (t *selftest) testAgent(ctx context.Context, dir string, installed *settings) error {
	defer syscall.Umask(syscall.Umask(0o022)) // [sensor] user must be able to run the files
	err := os.Chmod(dir, 0o755)
	for name, text := range selfFiles() {
		file := filepath.Join(dir, name)
		err = errors.Join(err, os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o755))
	}
	s, errRead := readSettings(dir + "/client.cfg")
	listener, errListen := net.Listen("tcp", "127.0.0.1:0")
	if err = errors.Join(err, errRead, errListen); err != nil {
		return err
	}
	if installed != nil {
		s.user = installed.user
	}
	s.monitor = &url.URL{Scheme: "http", Host: listener.Addr().String(), Path: "/xmlrpc/"}
	stored := make(chan storedReading, 1)
	m := &monitor{
		packages: dir + "/packages",
		next:     s.monitor.JoinPath("../RPC2").String(), // the same monitor by another URL
		stored:   func(r storedReading) error { stored <- r; return nil },
	}
	h := newHandler(m.methods())
	defer h.http.Close()
	go h.serve(listener)
	a, err := newAgent(s)
	if err != nil {
		return err
	}
	c := newClient(&url.URL{Scheme: "http", Host: a.listener.Addr().String()}, time.Minute, nil)
	defer c.close()
	ended := make(chan error, 1)
	ctx, cancel := context.WithTimeout(ctx, selfTime)
	go func() { ended <- a.run(ctx) }()
	for i := 0; i < len(selfSteps) && err == nil; i++ {
		err = t.step(ctx, c, selfSteps[i].call, selfSteps[i].want, stored)
	}
	cancel()
	return errors.Join(err, <-ended)
}

// step makes a call and waits for what the monitor gets.
func (t *selftest) step(ctx context.Context, c *client, call, want string, stored <-chan storedReading) error {
	words := strings.Fields(call)
	if _, err := c.call(ctx, words[0], wireValues(words[1:])...); err != nil {
		return fmt.Errorf("%s: %w", call, err)
	}
	select {
	case got := <-stored:
		_, outcome, _ := strings.Cut(got.String(), got.peer+" ")
		if outcome == want {
			t.row("ok", call, outcome)
		} else {
			t.row(failed, call, outcome+"; should be "+want)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: the monitor gets nothing: %w", call, ctx.Err())
	}
}

// testInstalled takes a reading from every sensor, for the first option in its help text.
// A sensor that fails and says why is skipped: the box has no such thing.
func (t *selftest) testInstalled(ctx context.Context, s *sensors) error {
	texts, err := s.helpTexts(ctx)
	if err != nil || len(texts) == 0 {
		fmt.Fprintln(t.out, strings.Join(s.warnings(), "\n"))
		return ctx.Err()
	}
	for _, name := range sortedKeys(texts) {
		if strings.HasPrefix(texts[name], noHelp) {
			t.row(failed, name, texts[name])
			continue
		}
		args := firstOption(texts[name])
		r, verdict := s.read(ctx, name, args, nil), failed
		if ctx.Err() != nil {
			return ctx.Err()
		}
		outcome := fmt.Sprint(r)
		switch agentsOwn := []int{codeNoNumber, codeNotStarted, codeNotFound}; {
		case r.code == 0:
			verdict, outcome = "ok", "exit 0, value "+r.value
		case r.code > 0 && r.reason != "" && !slices.Contains(agentsOwn, r.code):
			verdict = "skipped"
		}
		t.row(verdict, strings.TrimSpace(name+" "+strings.Join(args, " ")), outcome)
	}
	return nil
}

// firstOption returns the arguments that ask a sensor for the first thing in its help.
func firstOption(help string) (args []string) {
	// Every box can answer for these.
	examples := map[string]string{"<vol>": "/", "<dir>": "/", "<if>": "lo", "<host>": "127.0.0.1", "<name>": "picket"}
	line, _, _ := strings.Cut(help, "\n")
	for i, word := range strings.Fields(line) {
		if example, ok := examples[word]; ok {
			word = example
		} else if i > 0 {
			break
		}
		args = append(args, word)
	}
	return args
}
