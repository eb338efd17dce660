package main

// What a reading goes through, in this order: the directory of sensors, one run
// of one, the queue that limits how many run at once, the delivery to the
// monitor, the spool.
//
// A sensor is a directory with an executable, PATH/NAME/EXECUTABLE:
//
//	$ sensors/disk/check percent /
//	61.2
//
// It is started with its arguments and never through a shell, in its own
// directory and its own process group, with nothing on standard input and a
// decimal point that is a point. It prints one decimal number and exits 0, or
// says on standard error why not and exits with another code. With the argument
// "options" it prints what it can be asked.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log"
	"math"
	"math/rand"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"
	"unsafe"
)

const (
	maxTicket    = 1 << 10               // bytes of a ticket that is a string: 1,024 undelivered ones are 1 MiB
	maxName      = 234                   // bytes of a sensor's name: its backup's is 21 longer, and fits 255
	maxJoined    = 16                    // changes that join an equal one; for more of them it is made again
	maxArguments = 4 << 10               // bytes of a command's arguments, with the cost of each
	argumentCost = 32                    // bytes of memory that an argument takes beside its text
	maxOutput    = 4 << 10               // bytes of standard output: a number has 20, a help text a few hundred
	maxReason    = 1 << 10               // bytes of standard error that are kept, the last ones
	pipeSize     = 64 << 10              // bytes that a pipe holds
	outputPause  = 2 * time.Millisecond  // after each pipeSize bytes of output: a sensor may write for ever
	helpTime     = 10 * time.Second      // that a sensor has for its help text
	maxHelp      = 1 << 10               // bytes of one help text in an answer to cmd_list_sensors, as encoded
	maxFailed    = 200                   // bytes of the line that says why a change failed, as encoded
	nameCost     = 62                    // bytes of the tags around each name and its text
	maxHelps     = 48 << 10              // bytes of all of them with their names: an answer holds 64 KiB
	badHelpTime  = time.Minute           // before a sensor that gave none is asked again
	killTime     = 2 * time.Second       // from SIGTERM to SIGKILL, and from SIGKILL to giving up
	startTries   = 100                   // of a sensor that is just being written or replaced
	startPause   = 10 * time.Millisecond // between two of them
	orphanTime   = time.Second           // between two looks for orphans
	spareThreads = 6                     // beside those that run Go code: for files, names and signals
)

const (
	ownSensor   = "picket"        // the name of the sensor that is the agent itself
	swapPrefix  = ".picket-swap-" // begins the name of a version of a sensor while the next one takes its place
	noHelp      = "no help: "     // begins the text of a sensor that did not give one
	interrupted = "interrupted"   // why a run ended that was under way when picket was ended
)

// Exit codes that the agent itself stores for a run, beside the sensor's own
// and minus the signal that ended it.
const (
	codeNoNumber   = 65  // exit 0, but no number
	codeNotStarted = 126 // present, but could not be started
	codeNotFound   = 127 // no such sensor
)

// sensors is a directory of sensors, and how they are run.
type sensors struct {
	path, executable, help string
	ownSettings                                    // of the sensors that are not in own
	own                    map[string]*ownSettings // by sensor
	env                    []string                // beside what a sensorUser adds
	*runState
}

// A runState knows the runs that are under way. It stays when the settings change.
type runState struct {
	listing sync.Mutex           // is held while help texts are asked for
	helps   map[string]helpEntry // by sensor, version of its executable and how it is asked
	threads sync.Once            // are reserved before the first run

	mu        sync.Mutex // guards what is below
	processes map[*process]bool
	idle      []chan os.Signal // for the children of the next processes
}

// A process runs a sensor.
type process struct {
	sensor       string
	cmd          *exec.Cmd
	pid          int            // 0 while it starts
	children     chan os.Signal // gets a SIGCHLD when a child has ended, perhaps this one
	output, said capture
	stuck        bool // SIGKILL did not end it
}

// A helpEntry is a help text that was asked for, or why there is none.
type helpEntry struct {
	text  string
	until time.Time // when it is asked for again
}

// newSensors returns the sensors of a directory, which run as the agent's user.
func newSensors(path, executable, help string, timeout time.Duration) *sensors {
	return &sensors{
		path: path, executable: executable, help: help, ownSettings: ownSettings{timeout: timeout}, env: sensorEnv(),
		runState: &runState{processes: make(map[*process]bool)},
	}
}

// of returns the sensors with the settings of one of them.
func (s *sensors) of(name string) *sensors {
	with := *s
	if own := s.own[name]; own != nil {
		with.ownSettings = *own
	}
	return &with
}

// sensorEnv returns the environment of sensors: the agent's own, but with the
// decimal point of the C locale. os/exec uses the last value of a variable.
func sensorEnv() []string {
	env := os.Environ()
	if all := os.Getenv("LC_ALL"); all != "" { // it would override LC_NUMERIC
		env = slices.DeleteFunc(env, func(v string) bool { return strings.HasPrefix(v, "LC_") })
		env = append(env, "LANG="+all)
	}
	return append(env, "LC_NUMERIC=C")
}

// ticketOf returns v as a ticket: an int, an i8 or a string of at most 1 KiB.
func ticketOf(v any) (any, error) {
	switch kind, text := describe(v); {
	case kind != "int" && kind != "i8" && kind != "string":
		return nil, fmt.Errorf("a ticket is an int, an i8 or a string, not %s", kind)
	case len(text) > maxTicket:
		return nil, fmt.Errorf("a ticket has at most %d bytes", maxTicket)
	}
	return v, nil
}

// sensorName returns v as the name of a sensor: a string that is one plain
// path element, not hidden, of at most 234 bytes.
func sensorName(v any) (string, error) {
	name, ok := v.(string)
	if !ok {
		return "", fmt.Errorf("a sensor's name is a string, not %s", typeName(v))
	}
	bad := func(r rune) bool { return r == '/' || r == utf8.RuneError || !unicode.IsPrint(r) }
	if name == "" || len(name) > maxName || name[0] == '.' || strings.ContainsFunc(name, bad) {
		return "", fmt.Errorf("%s is not the name of a sensor", cut(name))
	}
	return name, nil
}

// arguments returns v as the arguments of a run: none for nil, an array's scalars
// as they stand (numbers in decimal, booleans as 1 and 0), or the words of a string.
// They have at most 4 KiB, where each counts 32 bytes more than its text.
func arguments(v any) (args []string, err error) {
	switch v := v.(type) {
	case nil:
	case []any:
		for _, scalar := range v {
			kind, text := describe(scalar)
			switch scalar := scalar.(type) {
			case nil, []any, map[string]any:
				return nil, fmt.Errorf("an argument is a scalar, not %s", kind)
			case []byte:
				text = string(scalar)
			}
			args = append(args, text)
		}
	case string:
		if args = []string{v}; len(v) <= maxArguments { // else it is too much, split or not
			args, err = splitWords(v)
		}
	default:
		err = fmt.Errorf("arguments are an array or a string, not %s", typeName(v))
	}
	size := 0
	for _, arg := range args {
		if strings.Contains(arg, "\x00") {
			return nil, errors.New("an argument holds a NUL byte")
		}
		size += len(arg) + argumentCost
	}
	if size > maxArguments {
		return nil, fmt.Errorf("more than %d bytes of arguments", maxArguments)
	}
	return args, err
}

// splitWords splits a string at white space, with the quoting of a shell's words and
// nothing else of a shell: '…' stays as it stands, a backslash in "…" escapes $ ` " \ and
// a newline, and elsewhere anything. An escaped newline is left out.
func splitWords(s string) ([]string, error) {
	words, text := []string{}, s+" " // which ends the last word
	var word []byte                  // nil outside of words
	var quote byte                   // ' or " or, outside of both, 0
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case c == '\\' && (quote == 0 || quote == '"' && strings.IndexByte("$`\"\\\n", text[i+1]) >= 0):
			if i++; i == len(s) {
				return nil, fmt.Errorf("nothing follows the backslash in %s", cut(s))
			}
			if s[i] != '\n' {
				word = append(word, s[i])
			}
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '\'' || c == '"'):
			quote, word = c, slices.Grow(word, 1) // not nil any more
		case quote == 0 && strings.IndexByte(" \t\n\r", c) >= 0:
			if word != nil {
				words, word = append(words, string(word)), nil
			}
		default:
			word = append(word, c)
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("no closing %c in %s", quote, cut(s))
	}
	return words, nil
}

// found returns the executables of the sensors, by name: a sensor is a directory with one in
// it. For each other directory found returns a line that says what is missing.
func (s *sensors) found() (executables map[string]fs.FileInfo, missing []string, err error) {
	entries, err := os.ReadDir(s.path)
	if err != nil {
		return nil, nil, fmt.Errorf("list sensors: %w", err)
	}
	executables = make(map[string]fs.FileInfo)
	for _, e := range entries {
		name, bad := sensorName(e.Name())
		info, err := os.Stat(filepath.Join(s.path, e.Name(), s.executable))
		switch {
		case e.Name()[0] == '.' || errors.Is(err, syscall.ENOTDIR): // not meant to be a sensor
		case bad != nil:
			why := fmt.Sprintf("its name is not plain text of at most %d bytes", maxName)
			missing = append(missing, fmt.Sprintf("sensor %s: %s", cut(e.Name()), why))
		case err != nil || info.IsDir():
			missing = append(missing, fmt.Sprintf("sensor %s: there is no file %s in its directory", cut(name), s.executable))
		default: // if it cannot be started, its help text says why
			executables[name] = info
		}
	}
	return executables, missing, nil
}

// warnings returns lines about what is allowed, but most often a mistake: there is no sensor
// (one may still be installed), or client.cfg has a section for one that is not there.
func (s *sensors) warnings() (lines []string) {
	found, _, err := s.found()
	switch {
	case err != nil:
		return []string{err.Error()}
	case len(found) == 0:
		return []string{"no sensors in " + s.path}
	}
	for _, name := range sortedKeys(s.own) {
		if name != ownSensor && found[name] == nil {
			lines = append(lines, fmt.Sprintf("[sensor %s]: there is no such sensor in %s", name, s.path))
		}
	}
	return lines
}

// helpTexts returns the help text of each sensor, or why there is none. It asks one
// sensor after the other, while readings go on, and asks none again until its executable
// changes. Callers wait for each other.
func (s *sensors) helpTexts(ctx context.Context) (map[string]string, error) {
	s.listing.Lock()
	defer s.listing.Unlock()
	found, _, err := s.found()
	if err != nil {
		return nil, err
	}
	texts := make(map[string]string)
	helps := make(map[string]helpEntry)
	for _, name := range sortedKeys(found) {
		file := found[name].Sys().(*syscall.Stat_t)
		version := fmt.Sprint(name, "/", s.help, file.Dev, file.Ino, file.Size, file.Ctim)
		h := s.helps[version] // where it is not there, its time is over
		if time.Now().After(h.until) {
			h = s.askHelp(ctx, name)
		}
		if ctx.Err() != nil { // the sensor was interrupted
			return nil, ctx.Err()
		}
		texts[name], helps[version] = h.text, h
	}
	s.helps = helps
	return texts, nil
}

// askHelp asks a sensor what it can be asked.
func (s *sensors) askHelp(ctx context.Context, name string) helpEntry {
	quick := s.of(name)
	quick.timeout = min(quick.timeout, helpTime)
	r := quick.runIn(ctx, filepath.Join(s.path, name), name, []string{s.help}, nil)
	text, why := strings.TrimSpace(r.value), "nothing said"
	switch {
	case r.code != 0:
		why = r.String()
	case len(r.value) > maxOutput:
		why = fmt.Sprintf("more than %d bytes", maxOutput)
	case text != "":
		return helpEntry{text, time.Now().Add(math.MaxInt64)}
	}
	return helpEntry{fmt.Sprintf("%s%s %s: %s", noHelp, name, s.help, why), time.Now().Add(badHelpTime)}
}

// fitHelps returns help texts, by the names of their sensors, that fit into one
// answer: first all names for which there is room, then of each text an equal share
// of what is left, 1 KiB at most. The text of a sensor whose change failed is cut
// further for a last line that says why.
func fitHelps(texts, failed map[string]string) map[string]any {
	listed, room := make(map[string]any), maxHelps
	var names []string
	for _, name := range sortedKeys(texts) {
		if size := nameCost + encodedLen(name); size <= room {
			room -= size
			names = append(names, name)
		}
	}
	for i, name := range names {
		share, last := min(maxHelp, room/(len(names)-i)), ""
		if why, ok := failed[name]; ok {
			last = fit("\nlast change failed: "+why, min(maxFailed, share))
		}
		text := fit(texts[name], share-encodedLen(last)) + last
		listed[name] = text
		room -= encodedLen(text)
	}
	return listed
}

// fit cuts a text to at most this many bytes, as encoded.
func fit(text string, most int) string {
	for n := encodedLen(text); n > most; n = encodedLen(text) {
		text = strings.ToValidUTF8(text[:len(text)*most/n], "")
	}
	return text
}

// encodedLen returns how many bytes a text takes in a message.
func encodedLen(text string) int {
	var b bytes.Buffer
	xml.EscapeText(&b, []byte(text)) // which cannot fail
	return b.Len()
}

// awaitListing waits until no help text is being asked for.
func (s *sensors) awaitListing() {
	s.listing.Lock()
	defer s.listing.Unlock()
}

// A reading is the outcome of one run of a sensor.
type reading struct {
	code   int    // 0, or why there is no number
	value  string // the sensor's own digits; "" where there is no number
	reason string // for the log, where the code is not 0; never sent
}

// String returns the code and, where there is one, the reason.
func (r reading) String() string {
	return strings.TrimSuffix(fmt.Sprintf("exit %d: %s", r.code, r.reason), ": ")
}

// read runs a sensor and makes a reading of the run, whatever the sensor does. Its standard
// error is copied to stderr or, if that is nil, becomes part of the reading's reason.
func (s *sensors) read(ctx context.Context, name string, args []string, stderr io.Writer) reading {
	r := s.of(name).runIn(ctx, filepath.Join(s.path, name), name, args, stderr)
	tooLong, text := len(r.value) > maxOutput, strings.TrimSpace(r.value)
	r.value = ""
	switch _, err := parseDecimal(text); {
	case err == nil && !tooLong && r.code >= 0:
		r.value = text
	case r.code == 0 && tooLong:
		r.code, r.reason = codeNoNumber, fmt.Sprintf("more than %d bytes of output", maxOutput)
	case r.code == 0:
		r.code, r.reason = codeNoNumber, fmt.Sprintf("not a number: %s", cut(text))
	}
	return r
}

// runIn runs the sensor in dir. It always returns: at the time-out, or when ctx
// ends, the process group gets SIGTERM and two seconds later SIGKILL. What is
// left of the group after a normal end is killed as well. A process that has
// left the group is not waited for. The value of the reading is what the sensor
// printed until then, the last maxOutput + 1 bytes. The reason is what the agent
// knows and what the sensor said, in one line.
func (s *sensors) runIn(ctx context.Context, dir, name string, args []string, stderr io.Writer) reading {
	if ctx.Err() != nil {
		return reading{code: -int(syscall.SIGTERM), reason: interrupted}
	}
	p := s.add(name)
	if p == nil {
		return reading{code: codeNotStarted, reason: "a process of an earlier run cannot be killed"}
	}
	s.threads.Do(reserveThreads)
	p.said.copy = stderr
	if err := s.start(p, dir, args); err != nil {
		s.remove(p)
		return notStarted(filepath.Join(dir, s.executable), err)
	}
	ended, code, why := p.await(ctx, s.timeout)
	if !ended {
		// It waits in the kernel, perhaps for a dead disk or network. It must not hold up
		// other sensors, and no second run may get stuck like it. It may still write, so
		// what was captured is left alone.
		s.mu.Lock()
		p.stuck = true
		s.mu.Unlock()
		go func() {
			p.waitEnded(context.Background(), math.MaxInt64) // however long it takes
			s.reap(p)
		}()
		return reading{code: code, reason: why}
	}
	if own := s.reap(p); code == 0 {
		code = own
	}
	switch said := strings.Join(strings.Fields(string(p.said.kept)), " "); {
	case code != 0 && said != "":
		why = strings.TrimPrefix(why+": "+strconv.Quote(said), ": ")
	case code < 0 && why == "":
		why = fmt.Sprintf("ended by signal %d (%v)", -code, syscall.Signal(-code))
	}
	return reading{code, string(p.output.kept), why}
}

// add notes that a sensor runs. It returns nil if a process of the sensor is stuck.
func (r *runState) add(name string) *process {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p := range r.processes {
		if p.sensor == name && p.stuck {
			return nil
		}
	}
	p := &process{sensor: name, output: capture{limit: maxOutput + 1}, said: capture{limit: maxReason}}
	if last := len(r.idle) - 1; last >= 0 {
		p.children, r.idle = r.idle[last], r.idle[:last]
	} else { // Notify is for good, as Stop would cost more than all else that a run needs
		p.children = make(chan os.Signal, 1)
		signal.Notify(p.children, syscall.SIGCHLD)
	}
	r.processes[p] = true
	return p
}

func (r *runState) remove(p *process) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.processes, p)
	r.idle = append(r.idle, p.children)
}

// running returns how many sensors run. A process that SIGKILL did not end counts.
func (r *runState) running() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.processes)
}

// start starts the executable in dir. Its name is relative to dir, so that it and its
// interpreter see one version even while the directory is replaced.
//
// It tries again, for a second at most, while the sensor is being replaced or its file is
// open for writing: one that was just written is still open, for a moment, in a process
// that another goroutine is starting.
func (s *sensors) start(p *process, dir string, args []string) error {
	file := filepath.Join(dir, s.executable)
	for try := 1; ; try++ {
		p.cmd = &exec.Cmd{
			Path:        "./" + s.executable,
			Args:        append([]string{file}, args...),
			Dir:         dir,
			Env:         append(slices.Clip(s.env), s.user.env...),
			Stdin:       nil, // /dev/null
			SysProcAttr: &syscall.SysProcAttr{Setpgid: true, Credential: s.user.credential},
		}
		stdout, err := p.cmd.StdoutPipe()
		stderr, err2 := p.cmd.StderrPipe()
		if err = errors.Join(err, err2); err == nil {
			err = p.cmd.Start()
		}
		if err == nil {
			p.output.begin(stdout)
			p.said.begin(stderr)
			s.mu.Lock()
			defer s.mu.Unlock()
			p.pid = p.cmd.Process.Pid
			return nil
		}
		switch isAbsent := errors.Is(err, syscall.ENOENT); {
		case try >= startTries:
			return err
		case errors.Is(err, syscall.ETXTBSY) || isAbsent && exists(filepath.Join(s.path, swapPrefix+p.sensor)):
		case isAbsent && exists(file): // it was away a moment ago, or else its interpreter is
			try += startTries / 4
		default:
			return err
		}
		time.Sleep(startPause)
	}
}

// notStarted returns the reading of a sensor that could not be started.
func notStarted(file string, err error) reading {
	var cause *os.PathError
	if errors.As(err, &cause) && cause.Op == "fork/exec" { // else there is no pipe, say, or no /dev/null
		err = cause.Err // without the name of the file, which is relative
		if isAbsent := errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR); isAbsent && !exists(file) {
			return reading{code: codeNotFound, reason: "no such sensor"}
		}
		err = whyNotStarted(file, err)
	}
	return reading{code: codeNotStarted, reason: fmt.Sprintf("start %s: %v", file, err)}
}

// whyNotStarted says why the kernel does not start an executable. If it cannot tell, it returns err.
func whyNotStarted(file string, err error) error {
	f, errOpen := openRegular(file)
	if errOpen != nil {
		return err
	}
	defer f.Close()
	info, errStat := f.Stat()
	head, _ := io.ReadAll(io.LimitReader(f, 256)) // more than the kernel reads
	line, _, _ := strings.Cut(string(head), "\n")
	interpreter, isScript := strings.CutPrefix(line, "#!")
	switch isELF, isAbsent := strings.HasPrefix(line, "\x7fELF"), errors.Is(err, syscall.ENOENT); {
	case errStat == nil && info.Mode()&0o111 == 0:
		return errors.New("no run bit (chmod +x sets it)")
	case errors.Is(err, syscall.EACCES):
		return errors.New("permission denied: is it mounted noexec, " +
			"or may the sensors' user not enter a directory above it?")
	case isScript && strings.HasSuffix(line, "\r"):
		return errors.New("it has Windows line ends")
	case isScript && isAbsent:
		return fmt.Errorf("no interpreter %s", cut(strings.TrimSpace(interpreter)))
	case isELF && isAbsent:
		return errors.New("its dynamic loader is missing: is it made for another system?")
	case isELF:
		return errors.New("wrong architecture, or a damaged binary")
	case !isScript && errors.Is(err, syscall.ENOEXEC):
		return errors.New(`neither a binary nor a script: no "#!" at its beginning`)
	}
	return err
}

// await waits until a process ends. At the time-out, or when ctx ends, it ends the process
// and returns the code and the reason. It reports whether the process has ended: not even
// SIGKILL ends one that waits in the kernel.
func (p *process) await(ctx context.Context, timeout time.Duration) (ended bool, code int, why string) {
	if p.waitEnded(ctx, timeout) {
		return true, 0, ""
	}
	why = fmt.Sprintf("timed out after %v", timeout)
	if ctx.Err() != nil {
		why = interrupted
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		syscall.Kill(-p.pid, sig)
		syscall.Kill(p.pid, sig) // it may have left its group
		if p.waitEnded(context.Background(), killTime) {
			return true, -int(sig), why
		}
	}
	return false, -int(syscall.SIGKILL), why + ", but still there"
}

// reap kills what is left of the process group of a child that has ended, reads what
// they wrote, reaps the child and returns its exit code, or minus the signal that ended
// it. In this order: until the child is reaped, nobody else can get the number of its
// group, and then os/exec closes the pipes.
func (r *runState) reap(p *process) int {
	defer r.remove(p)
	syscall.Kill(-p.pid, syscall.SIGKILL)
	p.output.finish()
	p.said.finish()
	p.cmd.Wait() // its error is in the state
	state := p.cmd.ProcessState
	if code := state.ExitCode(); code >= 0 || state == nil {
		return code // -1 where nobody knows, which is no success either
	}
	return -int(state.Sys().(syscall.WaitStatus).Signal())
}

// waitEnded waits until a process has ended, and does not reap it. It reports false if
// ctx ends first, or the time is over. It blocks no thread.
func (p *process) waitEnded(ctx context.Context, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for endedChild(p.pid) != p.pid {
		select {
		case <-p.children:
		case <-ctx.Done():
			return endedChild(p.pid) == p.pid // it may have, while the agent stood still
		}
	}
	return true
}

// endedChild looks at one child or, for 0, at all of them. It returns the number of one
// that has ended and is not reaped yet, or 0. A child that is not there has ended.
func endedChild(pid int) int {
	which := min(pid, 1)                 // P_ALL or P_PID of <sys/wait.h>
	var info [32]int32                   // siginfo_t
	const siPid = 3 + strconv.IntSize/64 // behind three ints, aligned to a word
	_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, uintptr(which), uintptr(pid),
		uintptr(unsafe.Pointer(&info)), syscall.WEXITED|syscall.WNOHANG|syscall.WNOWAIT, 0, 0)
	if errno != 0 {
		return pid
	}
	return int(info[siPid])
}

// reapOrphans reaps the processes that other processes leave to process 1, until
// ctx ends. It never takes the process of a run, whose exit code the run needs.
func (r *runState) reapOrphans(ctx context.Context) {
	for ctx.Err() == nil {
		r.mu.Lock()
		pid := endedChild(0)
		for p := range r.processes {
			if p.pid == pid || p.pid == 0 { // it is that of a run, perhaps of one that starts
				pid = 0
			}
		}
		r.mu.Unlock()
		if pid > 0 {
			syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
			continue
		}
		select {
		case <-time.After(orphanTime):
		case <-ctx.Done():
		}
	}
}

// reserveThreads makes threads for goroutines that block at the same time. The runtime
// keeps them. Without this reserve it would end the agent when it needs one more
// thread while a sensor has used up the limit of processes.
func reserveThreads() {
	var all sync.WaitGroup
	n := runtime.GOMAXPROCS(0) + spareThreads
	all.Add(n)
	for i := 0; i < n; i++ {
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			all.Done()
			all.Wait() // so that no thread is used twice
		}()
	}
	all.Wait()
}

// A capture keeps the last bytes that a process writes to a pipe. os/exec would close the
// pipe some time after the process ended, even with something left in it: an agent that
// stood still for so long would lose a number, or half of one.
type capture struct {
	limit int
	copy  io.Writer     // gets all that is written, and nothing is kept; may be nil
	kept  []byte        // once finish has returned
	fast  int           // bytes since the last pause
	pipe  *os.File      // the end to read from
	part  [1 << 10]byte // what was read last: most sensors write one number
	ended chan struct{} // closed when nothing reads from the pipe any more
}

// begin reads from a pipe of os/exec from now on.
func (c *capture) begin(pipe io.ReadCloser) {
	c.pipe, c.ended = pipe.(*os.File), make(chan struct{})
	go func() {
		defer close(c.ended)
		io.CopyBuffer(c, struct{ io.Reader }{pipe}, c.part[:])
	}()
}

// Write never fails.
func (c *capture) Write(p []byte) (int, error) {
	if c.copy != nil {
		c.copy.Write(p) // an error there must not end the sensor
	} else {
		c.kept = append(c.kept, p...)
		c.kept = c.kept[max(0, len(c.kept)-c.limit):]
	}
	if c.fast += len(p); c.fast >= pipeSize {
		c.fast = 0
		time.Sleep(outputPause)
	}
	return len(p), nil
}

// finish reads what a process left in the pipe when it ended. It does not wait for others
// that keep the pipe open.
func (c *capture) finish() {
	c.pipe.SetReadDeadline(time.Now()) // ends the goroutine that reads, which may wait
	<-c.ended
	pipe, _ := c.pipe.SyscallConn() // no error: it is a file
	pipe.Control(func(fd uintptr) {
		for left, n := pipeSize, 1; left > 0 && n > 0; left -= n {
			n, _ = syscall.Read(int(fd), c.part[:])
			c.Write(c.part[:max(0, n)])
		}
	})
}

// A command is what the monitor asks: a reading, or a change of the agent.
type command struct {
	change string // "" for a reading
	ticket any    // int, int64 or string; nil where a change has none
	sensor string
	args   []string
	from   string // who asks: they take turns
}

// String names a command for the log. A sensor's name is quoted unless it is plain.
func (c command) String() string {
	const plain = "-._0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	verb, name := c.change, c.sensor
	if verb == "" {
		verb = "sensor"
	}
	if strings.Trim(name, plain) != "" {
		name = cut(name)
	}
	return strings.TrimSpace(verb + " " + name)
}

// sameWork reports whether two commands ask the same, perhaps under two tickets.
func (c command) sameWork(d command) bool {
	return c.change == d.change && c.sensor == d.sensor && slices.Equal(c.args, d.args)
}

// A job is a command in the queue.
type job struct {
	command
	turn    int        // when it may run, among those that wait in its lane
	joined  []*job     // equal changes that waited when it began, and have its outcome
	expired bool       // it waits for room no longer
	entered chan error // gets nil when it finds room, or a fault
}

// A lane is one of the two parts of the queue. Callers take turns. The commands of
// one caller run in the order they came, except those for a sensor at its limit.
type lane struct {
	limit   int // of running
	running []*job
	waiting []*job           // the next one first
	callers map[string]share // of those that wait, by caller
	turn    int              // the latest turn of those that have begun
}

// A share is what one caller has in a lane.
type share struct{ waiting, turn int } // the turn of its latest command

// mayRun reports whether a command for a sensor can run now. A sensor never takes all of
// several slots, so that one that hangs does not stop the others.
func (l *lane) mayRun(sensor string) bool {
	runs := 0
	for _, j := range l.running {
		if j.sensor == sensor {
			runs++
		}
	}
	return len(l.running) < l.limit && (l.limit == 1 || runs < l.limit-1)
}

// push lets a command wait for the next turn, or for the one after its caller's last. It
// reports whether there is room: if the command can run at once, if fewer than size wait, or
// if fewer than twice as many do and few are its caller's.
func (l *lane) push(j *job, size int) bool {
	all, own := len(l.waiting), l.callers[j.from]
	if all >= size && !l.mayRun(j.sensor) && (all >= 2*size || own.waiting >= max(1, size/4)) {
		return false
	}
	j.turn = max(l.turn, own.turn) + 1
	l.callers[j.from] = share{own.waiting + 1, j.turn}
	i, _ := slices.BinarySearchFunc(l.waiting, j.turn+1, func(other *job, turn int) int { return other.turn - turn })
	l.waiting = slices.Insert(l.waiting, i, j)
	return true
}

// next starts the first command that may run, with the changes that join it. It returns
// nil if there is none.
func (l *lane) next() *job {
	i := slices.IndexFunc(l.waiting, func(j *job) bool { return l.mayRun(j.sensor) })
	if i < 0 {
		return nil
	}
	j := l.take(i)
	l.turn = max(l.turn, j.turn)
	l.running = append(l.running, j)
	for i := 0; j.change != "" && i < len(l.waiting) && len(j.joined) < maxJoined; {
		switch other := l.waiting[i]; {
		case other.sameWork(j.command):
			j.joined = append(j.joined, l.take(i))
		case other.sensor == j.sensor: // another change, which must come first
			return j
		default:
			i++
		}
	}
	return j
}

// take takes a command out of those that wait.
func (l *lane) take(i int) *job {
	j := l.waiting[i]
	l.waiting = slices.Delete(l.waiting, i, i+1)
	own := l.callers[j.from]
	l.callers[j.from] = share{own.waiting - 1, own.turn}
	if own.waiting == 1 {
		delete(l.callers, j.from)
	}
	return j
}

// A queue runs commands and delivers one reading for each ticket. Readings and
// changes have a lane each, so that an update over a bad link does not hold up
// readings. No caller can keep others out by filling it: one with less than a quarter
// of its size in it finds room up to twice that size.
type queue struct {
	run     func(context.Context, command) reading
	deliver func(ticket any, r reading)
	discard func(ticket any) // the undelivered reading, if there is one

	ctx    context.Context // of what runs
	cancel context.CancelFunc
	work   sync.WaitGroup // what runs

	mu       sync.Mutex // guards what is below
	size     int        // of waiting, in each lane
	readings lane
	changes  lane
	active   map[any]*job // waiting or running, by ticket
	outside  []*job       // those that wait for room, in the order they came
	closed   bool
}

// newQueue returns a queue that runs concurrency readings and one change at once. In
// each of the two lanes size commands may wait.
func newQueue(concurrency, size int, run func(context.Context, command) reading,
	deliver func(any, reading), discard func(any)) *queue {
	ctx, cancel := context.WithCancel(context.Background())
	return &queue{
		run: run, deliver: deliver, discard: discard, ctx: ctx, cancel: cancel,
		size: size, active: make(map[any]*job),
		readings: lane{limit: concurrency, callers: make(map[string]share)},
		changes:  lane{limit: 1, callers: make(map[string]share)},
	}
}

// resize changes how many readings run at once and how many commands may wait.
func (q *queue) resize(concurrency, size int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.readings.limit, q.size = concurrency, size
	q.start(&q.readings)
	q.admit()
}

// count returns how many commands wait.
func (q *queue) count() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.readings.waiting) + len(q.changes.waiting)
}

// running lists what runs.
func (q *queue) running() (names []string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, j := range append(slices.Clone(q.readings.running), q.changes.running...) {
		names = append(names, j.command.String())
	}
	return names
}

// accept takes a command, and waits for room until the deadline or the end of
// ctx, first come, first served. Its error is a fault.
//
// A command with the ticket of an equal one that waits or runs is that one. Any
// other command with a known ticket takes the ticket away: the monitor has given
// it to two commands, and only the later one's reading is delivered.
func (q *queue) accept(ctx context.Context, c command, deadline time.Time) error {
	j := &job{command: c, entered: make(chan error, 1)}
	q.mu.Lock()
	q.outside = append(q.outside, j)
	q.admit()
	q.mu.Unlock()
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	select {
	case err := <-j.entered:
		return err
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	j.expired = true
	q.admit()
	return <-j.entered
}

// admit lets in the commands that wait for room, as far as there is any, and refuses those
// that have waited for long enough. A queue that is closed refuses them all.
func (q *queue) admit() { q.outside = slices.DeleteFunc(q.outside, q.decide) }

// decide gives a command a place in the queue or refuses it with a fault. It reports
// false if the command has to wait for room.
func (q *queue) decide(j *job) bool {
	var refusal error
	l := &q.readings
	if j.change != "" {
		l = &q.changes
	}
	switch known := q.active[j.ticket]; {
	case known != nil && known.sameWork(j.command):
	case q.closed:
		refusal = faultf(faultBusy, "the agent is shutting down")
	case l.push(j, q.size):
		if j.ticket != nil {
			q.active[j.ticket] = j
			q.discard(j.ticket)
		}
		q.start(l)
	case j.expired:
		refusal = faultf(faultBusy, "the queue is full: %d commands wait", q.size)
	default:
		return false
	}
	j.entered <- refusal
	return true
}

// start runs commands of a lane, as many as may run.
func (q *queue) start(l *lane) {
	for j := l.next(); j != nil; j = l.next() {
		q.work.Add(1)
		go func(j *job) {
			defer q.work.Done()
			for j != nil {
				j = q.finish(l, j, q.run(q.ctx, j.command))
			}
		}(j)
	}
}

// finish delivers the reading of a command, and returns the next one to run.
func (q *queue) finish(l *lane, j *job, r reading) *job {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.deliverAll(j, r)
	l.running = slices.DeleteFunc(l.running, func(other *job) bool { return other == j })
	next := l.next()
	q.admit()
	return next
}

// deliverAll delivers the reading of a command for its own ticket and those of the
// commands that joined it, but not for a ticket that was given to another command.
func (q *queue) deliverAll(j *job, r reading) {
	for _, j := range append([]*job{j}, j.joined...) {
		if q.active[j.ticket] == j {
			delete(q.active, j.ticket)
			q.deliver(j.ticket, r)
		}
	}
}

// close takes no more commands. Those that wait get the reading of a run that
// SIGTERM ended; those that run have until ctx ends. When close returns, nothing
// runs and every reading has been delivered.
func (q *queue) close(ctx context.Context) {
	q.mu.Lock()
	q.closed = true
	for _, l := range []*lane{&q.readings, &q.changes} {
		for _, j := range l.waiting {
			q.deliverAll(j, reading{code: -int(syscall.SIGTERM), reason: "the agent ends"})
		}
		l.waiting = nil
	}
	q.admit() // which refuses them
	q.mu.Unlock()
	context.AfterFunc(ctx, q.cancel)
	q.work.Wait()
}

const (
	maxPending  = 1024            // readings that wait for the monitor in memory alone
	roomForRuns = 65 + maxJoined  // of them, kept free for what runs when no more may begin
	maxBackoff  = 5 * time.Minute // between two attempts to reach a monitor that is away
	maxTries    = 3               // faults after which a reading is dropped
	faultFactor = 10              // times the backoff of a monitor that is away: databases stay locked for long
	lastTime    = time.Second     // for each attempt when the agent ends
	lastMisses  = 4               // attempts in a row that may fail then
	spoolRetry  = time.Minute     // before a spool that could not be written is tried again
	spoolAge    = 2 * time.Second // of a reading that the monitor still does not have: it belongs in the spool
	spoolTime   = 5 * time.Second // for the last write to the spool when the agent ends
)

// A pendingReading is a reading that the monitor does not have yet.
type pendingReading struct {
	reading
	ticket    any       // int, int64 or string, as the monitor sent it
	taken     clocks    // when the run ended, by all clocks of the box
	since     time.Time // the same by the clock of this process; zero if it is from the spool
	misses    int       // attempts that the monitor did not answer
	faults    int       // attempts that it answered with a fault
	notBefore time.Time // of the next attempt
	record    uint64    // its number in the spool; 0: it has none
	size      int       // bytes of its record
}

// A delivery hands readings in at the monitor with cmd_store_probe_data, one at
// a time: old monitors serve one connection after the other. One rule chooses
// the next reading: the one tried least often, in turn from the oldest and from
// the newest end: neither a backlog nor a reading that always fails holds up others.
//
// A reading leaves the delivery when the monitor has taken it, has answered it
// with three faults or has given its ticket away again. The oldest is dropped
// when there is no more room: for 1,024 readings in memory, and for what the spool
// may hold. While the monitor is away, one attempt is made after 1, 2, 4 …
// seconds, at most 5 minutes, ±50 %, however many readings wait.
//
// With a spool, all readings that are pending are on the disk as soon as the disk allows,
// when the monitor did not take one at the first attempt or within two seconds, while it is
// away, and when the agent ends. A goroutine of its own writes the spool: a disk that hangs
// holds up neither sensors nor the delivery.
type delivery struct {
	retry   time.Duration // the first backoff
	clocks  func() clocks
	cancel  context.CancelFunc // ends the attempt that close finds under way
	dropped logLimit
	away    logLimit      // for lines that the monitor is away or back: it may be so every second
	spool   *spool        // nil: there is none; else it belongs to the goroutine that writes it
	sent    chan struct{} // closed when the goroutine that sends has ended
	saved   chan struct{} // closed when the goroutine that writes the spool has ended

	mu        sync.Mutex // guards what is below
	changed   *sync.Cond // of mu; is broadcast at each change
	client    *client
	zone      *time.Location
	noValue   string            // sent where there is no number
	pending   []*pendingReading // oldest first
	newest    bool              // the next reading is looked for from the newest end
	inMemory  int               // of pending, the last ones, which have no record in the spool
	awaySince time.Time         // zero while the monitor is there
	misses    int               // attempts without an answer since the latest answer
	retryAt   time.Time         // no attempt before that
	ending    bool              // there is no limit any more, and everything is saved
	closing   bool              // close alone makes attempts
	closed    bool              // no more attempts are made
	totals    deliveryTotals

	unsaved bool   // the spool lacks what must survive a power cut
	marks   []byte // to be added to the spool: for the records that are done
	onDisk  uint64 // the highest number of a record in the spool
}

// deliveryTotals counts readings since the start of the agent.
type deliveryTotals struct {
	undelivered        int // at present
	delivered, dropped int
	latest             time.Time // the latest delivery, or the start
	spoolBytes         int64     // at present
}

// newDelivery returns a delivery that works until close. It starts with what the spool
// holds (nil: there is none). retry is the first backoff.
func newDelivery(c *client, zone *time.Location, noValue string, retry time.Duration, s *spool) *delivery {
	d := &delivery{
		retry: retry, clocks: systemClocks(),
		client: c, zone: zone, noValue: noValue, sent: make(chan struct{}), saved: make(chan struct{}),
		totals: deliveryTotals{latest: time.Now()},
	}
	d.changed = sync.NewCond(&d.mu)
	ctx, cancel := context.WithCancel(context.Background())
	d.cancel = cancel
	if s != nil {
		d.open(s)
	}
	go func() {
		defer close(d.sent)
		for p := d.next(); p != nil; p = d.next() {
			d.try(ctx, p)
		}
	}()
	go d.writeSpool()
	return d
}

// open opens a spool and takes what it holds. A spool that cannot be opened is not used.
func (d *delivery) open(s *spool) {
	found, err := s.open()
	if err != nil {
		log.Printf(severe+"spool %s: not used: %v; undelivered readings are in memory alone", s.file(), err)
		s.close()
		return
	}
	d.spool, d.pending, d.onDisk = s, found, s.last
	if s.damaged > 0 {
		log.Printf(warning+"spool %s: %s passed over", s.file(), plural(s.damaged, "damaged record"))
	}
	if len(found) > 0 {
		log.Printf(notice+"spool %s: %s to deliver from the time before", s.file(), plural(len(found), "reading"))
	}
}

// configure applies new settings to all further attempts, and retries at once.
// Attempts that failed before do not count any more.
func (d *delivery) configure(c *client, zone *time.Location, noValue string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.misses, d.retryAt = 0, time.Time{}
	if d.client.url.String() != c.url.String() {
		d.awaySince = time.Time{}
	}
	for _, p := range d.pending {
		p.notBefore, p.misses, p.faults = time.Time{}, 0, 0
	}
	d.client.close()
	d.client, d.zone, d.noValue = c, zone, noValue
	d.changed.Broadcast()
}

// monitor returns the client of the monitor that readings go to.
func (d *delivery) monitor() *client {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.client
}

// count returns how many readings are pending, and what became of the others.
func (d *delivery) count() deliveryTotals {
	d.mu.Lock()
	defer d.mu.Unlock()
	totals := d.totals
	totals.undelivered = len(d.pending)
	return totals
}

// put takes a reading of a run that has just ended. It never blocks.
func (d *delivery) put(ticket any, r reading) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r.reason = "" // the log has it already, and thousands of them may wait
	p := &pendingReading{reading: r, ticket: ticket, taken: d.clocks(), since: time.Now()}
	d.pending = append(d.pending, p)
	d.inMemory++
	d.unsaved = d.unsaved || d.ending || !d.awaySince.IsZero()
	if d.inMemory > maxPending && !d.ending {
		d.drop(d.unspooled()[0], fmt.Sprintf("the oldest of more than %d undelivered", maxPending))
	}
	d.changed.Broadcast()
}

// unspooled returns the readings that are in memory alone. The spool has all before them.
func (d *delivery) unspooled() []*pendingReading { return d.pending[len(d.pending)-d.inMemory:] }

// drop gives a reading up and logs why.
func (d *delivery) drop(p *pendingReading, why string) {
	if d.remove(p) {
		d.totals.dropped++
		d.dropped.printf(warning+"%s: reading dropped: %s", ticketText(p.ticket), why)
	}
}

// remove ends the life of a reading that needs no attempt more, in the spool as well. It
// reports false where the reading was not pending any more.
func (d *delivery) remove(p *pendingReading) bool {
	i := slices.Index(d.pending, p)
	if i < 0 {
		return false
	}
	d.pending = slices.Delete(d.pending, i, i+1)
	if p.record == 0 {
		d.inMemory--
	} else {
		d.marks = append(d.marks, markRecord(p.record)...)
	}
	return true
}

// discard forgets the reading of a ticket that the monitor has given away again.
func (d *delivery) discard(ticket any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := slices.IndexFunc(d.pending, func(p *pendingReading) bool { return p.ticket == ticket })
	if i < 0 {
		return
	}
	p := d.pending[i]
	d.remove(p)
	d.unsaved = d.unsaved || p.record > 0 // it must not come back
	d.dropped.printf("%s: reading discarded: the ticket was given away again", ticketText(ticket))
	d.changed.Broadcast()
}

// full reports whether runs have to wait: the monitor is there, but slower than
// the sensors. While it is away nobody waits for it.
func (d *delivery) full() bool {
	return d.inMemory >= maxPending-roomForRuns && d.awaySince.IsZero() && !d.ending
}

// waitRoom waits until a run may begin. After putLast every run may, and once ctx has ended
// the next change of d ends the wait. So a monitor that is slower than the sensors makes its
// dispatcher wait, and nothing is dropped.
func (d *delivery) waitRoom(ctx context.Context) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.full() && ctx.Err() == nil {
		d.changed.Wait()
	}
}

// stalledSince returns since when runs have had to wait and the monitor has taken
// no reading, or the zero time if no run has to wait.
func (d *delivery) stalledSince() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case !d.full():
		return time.Time{}
	case d.pending[0].since.After(d.totals.latest):
		return d.pending[0].since
	}
	return d.totals.latest
}

// next waits for a reading that may be tried and returns it, or nil when d closes.
func (d *delivery) next() *pendingReading {
	d.mu.Lock()
	defer d.mu.Unlock()
	for !d.closing {
		p, at := d.choose(time.Now())
		if p != nil {
			d.newest = !d.newest
			return p
		}
		d.wait(at)
	}
	return nil
}

// wait unlocks the delivery until something changes or, unless that is zero, at is reached.
func (d *delivery) wait(at time.Time) {
	if !at.IsZero() {
		defer time.AfterFunc(time.Until(at), func() {
			d.mu.Lock() // so that it does not come before Wait
			defer d.mu.Unlock()
			d.changed.Broadcast()
		}).Stop()
	}
	d.changed.Wait()
}

// choose returns the reading to try now, or when there may be one (zero: after a change).
func (d *delivery) choose(now time.Time) (best *pendingReading, at time.Time) {
	if now.Before(d.retryAt) {
		return nil, d.retryAt
	}
	for i := range d.pending {
		p := d.pending[i]
		if d.newest {
			p = d.pending[len(d.pending)-1-i]
		}
		switch {
		case now.Before(p.notBefore):
			if at.IsZero() || p.notBefore.Before(at) {
				at = p.notBefore
			}
		case p.misses == 0: // as a rule the first
			return p, at
		case best == nil || p.misses < best.misses:
			best = p
		}
	}
	return best, at
}

// try makes one attempt to deliver a reading, and returns d.misses after that.
func (d *delivery) try(ctx context.Context, p *pendingReading) (misses int) {
	d.mu.Lock()
	c, zone, value := d.client, d.zone, p.value
	if value == "" {
		value = d.noValue
	}
	d.mu.Unlock()
	taken := dateTime(p.taken.corrected(d.clocks()).In(zone).Format(dateTimeLayout))
	_, err := c.call(ctx, "cmd_store_probe_data", p.ticket, []any{p.code, value}, taken)
	return d.record(p, c, err)
}

// record notes how an attempt with this client ended, and returns what try does.
func (d *delivery) record(p *pendingReading, c *client, err error) (misses int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch now := time.Now(); {
	case err == nil:
		d.remove(p)
		d.totals.delivered++
		d.totals.latest = now
		d.answered(now)
	case c != d.client, errors.Is(err, context.Canceled): // that says nothing of the monitor
	case errors.As(err, new(*fault)):
		p.faults++
		p.notBefore = now.Add(backoff(faultFactor*d.retry, p.faults))
		d.unsaved = true
		if p.faults == maxTries {
			d.drop(p, fmt.Sprintf("monitor %s: %v", masked(c.url.String()), err))
		}
		d.answered(now)
	default:
		d.missed(p, now, err)
	}
	d.changed.Broadcast()
	return d.misses
}

// answered notes that the monitor is there.
func (d *delivery) answered(now time.Time) {
	if !d.awaySince.IsZero() {
		away := now.Sub(d.awaySince).Round(time.Second)
		d.away.printf(notice+"monitor %s: back after %s, %d to deliver", masked(d.client.url.String()), away, len(d.pending))
	}
	d.awaySince, d.misses, d.retryAt = time.Time{}, 0, time.Time{}
}

// missed notes an attempt that got no answer. Where it comes right after an answer,
// the monitor fails on this reading, which then waits longer than the others.
func (d *delivery) missed(p *pendingReading, now time.Time, err error) {
	if d.awaySince.IsZero() {
		d.awaySince = now
		if !d.closing { // an attempt has a second only then, which says little of the monitor
			d.away.printf(warning+"monitor %s: away: %s", masked(d.client.url.String()), oneLine(err.Error()))
		}
	}
	d.misses++
	p.misses++
	d.retryAt = now.Add(backoff(d.retry, d.misses))
	if d.misses == 1 {
		p.notBefore = now.Add(backoff(d.retry, p.misses))
	}
	d.unsaved = true
}

// backoff returns how long to wait after n failures in a row: first, doubled with each
// further one up to 5 minutes, and 50 to 150 % of that by chance, so that a thousand boxes
// do not all call at the moment when their monitor is back.
func backoff(first time.Duration, n int) time.Duration {
	d := min(first<<min(n-1, 20), maxBackoff)
	return d/2 + time.Duration(rand.Int63n(int64(d)+1))
}

// putLast prepares the end of the agent: from now on put drops nothing, as the
// readings of commands that waited must not push out what was measured, and all go to
// the spool at once, as an init may not wait for long.
func (d *delivery) putLast() { d.note(&d.ending) }

// close tries each pending reading once more, as long as ctx and the monitor
// allow, and ends the delivery. It logs how many are left, and the spool, if there is
// one, holds them. A disk that hangs delays the end by at most five seconds.
func (d *delivery) close(ctx context.Context) {
	d.putLast()
	context.AfterFunc(ctx, d.cancel)
	time.AfterFunc(lastTime, d.cancel) // the attempt under way may have been so for long
	d.note(&d.closing)
	<-d.sent
	d.sendLast(ctx)
	d.note(&d.closed)
	select {
	case <-d.saved:
	case <-time.After(spoolTime):
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.client.close()
	lost := 0 // those of which no record was written
	for _, p := range d.pending {
		if p.record == 0 || p.record > d.onDisk {
			lost++
		}
	}
	if n := len(d.pending); n > 0 {
		log.Printf(warning+"monitor %s: %s not delivered, %d of them in memory alone", masked(d.client.url.String()),
			plural(n, "reading"), lost)
	}
}

// note sets a flag that others wait for. The spool is written once more.
func (d *delivery) note(flag *bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	*flag, d.unsaved = true, true
	d.changed.Broadcast()
}

// sendLast tries each reading once more, until ctx ends or four in a row have no answer.
func (d *delivery) sendLast(ctx context.Context) {
	d.mu.Lock()
	d.misses = 0
	left := slices.Clone(d.pending)
	d.mu.Unlock()
	for misses := 0; len(left) > 0 && misses < lastMisses && ctx.Err() == nil; left = left[1:] {
		limited, cancel := context.WithTimeout(ctx, lastTime)
		misses = d.try(limited, left[0])
		cancel()
	}
}

// writeSpool writes the spool whenever that is due, and when all has been sent once more.
func (d *delivery) writeSpool() {
	defer close(d.saved)
	if d.spool == nil {
		return
	}
	defer d.spool.close()
	d.mu.Lock()
	defer d.mu.Unlock()
	for !d.closed {
		now, at := time.Now(), time.Time{}
		if d.inMemory > 0 {
			at = d.unspooled()[0].since.Add(spoolAge)
			d.unsaved = d.unsaved || !now.Before(at)
		}
		isDue := d.unsaved || len(d.marks) > 0 || d.spool.isOutdated(d.clocks())
		if isDue {
			at = d.spool.retryAt
		}
		if isDue && !now.Before(at) {
			d.updateSpool()
		} else {
			d.wait(at)
		}
	}
	d.updateSpool()
}

// updateSpool writes what is to be written now, unlocked meanwhile. A file that would become
// too large is written anew.
func (d *delivery) updateSpool() {
	s, now := d.spool, d.clocks()
	sync := d.unsaved
	records := d.newRecords(now)
	size := s.size + len(records)
	rewrite := s.isOutdated(now) || size > s.limit || len(d.pending) == d.inMemory && size > 0
	var all []*pendingReading // that are in the file after this
	if rewrite {
		all = slices.Clone(d.pending[:len(d.pending)-d.inMemory])
	}
	d.changed.Broadcast() // there is room in memory
	d.mu.Unlock()
	var err error
	if rewrite {
		err = s.rewrite(all, now)
	} else if len(records) > 0 {
		err = s.append(records, sync)
	}
	d.mu.Lock()
	failed := !s.retryAt.IsZero()
	s.written, s.retryAt, d.totals.spoolBytes = now, time.Time{}, int64(s.size)
	if err != nil {
		s.written, s.retryAt = clocks{}, time.Now().Add(spoolRetry)
	} else {
		d.onDisk = s.last
	}
	if err != nil && !failed {
		log.Printf(severe+"spool %s: %v; undelivered readings are in memory alone", s.file(), err)
	} else if err == nil && failed {
		log.Printf(notice+"spool %s: works again", s.file())
	}
}

// newRecords returns what is to be added to the spool. If that is more than the spool may
// hold, the oldest readings are dropped: a quarter of the file is left for marks, so that
// it need not be written anew for each reading.
func (d *delivery) newRecords(now clocks) (records []byte) {
	held := 0 // bytes of the records that are not done
	for i := 0; i < len(d.pending) && d.unsaved; i++ {
		p := d.pending[i]
		if p.record == 0 {
			d.spool.last++
			p.record = d.spool.last
			record := readingRecord(p, now)
			p.size = len(record)
			d.inMemory--
			records = append(records, record...)
		}
		held += p.size
	}
	for held > d.spool.limit/4*3 {
		held -= d.pending[0].size
		d.drop(d.pending[0], "the oldest of what the spool holds")
	}
	records = append(records, d.marks...)
	d.marks, d.unsaved = nil, false
	return records
}

// A spool is a file of readings that the monitor does not have yet,
// DIR/readings, one record a line, each with the CRC-32 of what follows it:
//
//	1d3f6a02 r 17 4b825dc6 81234560 1795633401250 0 0.42 int 7
//	53ab0c11 d 17
//
// r is a reading: its number, the boot it was taken in, when that was by the
// time since boot and by the clock (both in milliseconds), exit code, value (-
// where there is none), the ticket's type and the ticket. d marks one as done.
// Records of type c, which older agents wrote, and damaged lines are passed over.
//
// A write with new readings is synced once; marks are not, so that some readings
// may come again after a power cut. When nothing is pending, the file is empty.
//
// The directory and the path to it belong to the agent's user or root, and nobody else
// can change them, so that no file of another user is read or written.
type spool struct {
	dir     string
	limit   int       // bytes of the file
	folder  *os.File  // the directory, which stays locked
	f       *os.File  // the file
	size    int       // bytes of the file
	last    uint64    // the highest number of a record
	damaged int       // lines that could not be read
	written clocks    // when the file was written; zero after an error, and at first
	retryAt time.Time // after an error; zero while the spool works
}

// newSpool returns the spool in a directory, or nil where that is "".
func newSpool(dir string, limit int64) *spool {
	if dir == "" {
		return nil
	}
	return &spool{dir: dir, limit: int(limit)}
}

const (
	spoolFile = "readings"
	spoolNext = "readings.next" // becomes the file when that is written anew
	maxRecord = 16 << 10        // bytes of a line: a ticket of 1 KiB, quoted, and a value of 4 KiB
)

func (s *spool) file() string { return filepath.Join(s.dir, spoolFile) }

// open locks the directory, opens the file and returns what it holds. Even after an error
// the spool is to be closed.
func (s *spool) open() (found []*pendingReading, err error) {
	if err = makePrivate(s.dir, false); err != nil {
		return nil, err
	}
	s.folder, err = os.Open(s.dir)
	if err == nil && flockWithin(context.Background(), s.folder, 0) != nil {
		err = errors.New("another process uses it")
	}
	if err == nil {
		s.f, err = os.OpenFile(s.file(), os.O_RDWR|os.O_CREATE, 0o600)
	}
	if err == nil {
		syscall.Unlink(filepath.Join(s.dir, spoolNext)) // a power cut may have left it
		found, err = s.read(s.f)
	}
	if err == nil {
		err = syncFile(s.folder) // the file may be new
	}
	return found, err
}

// makePrivate makes a directory and what is missing of its path. It returns an error
// where somebody else than the agent's user and root can change one of them. Where
// others may add to it, as to /tmp, it can be part of a path, but not the end of one.
func makePrivate(path string, isParent bool) error {
	if parent := filepath.Dir(path); parent != path {
		if err := makePrivate(parent, true); err != nil {
			return err
		}
		err := os.Mkdir(path, 0o700)
		if err == nil {
			err = syncDir(parent)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	owner := int(info.Sys().(*syscall.Stat_t).Uid)
	switch mode := info.Mode(); {
	case owner != 0 && owner != os.Geteuid():
		return fmt.Errorf("%s belongs to another user", path)
	case mode&fs.ModeSymlink != 0:
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			return err
		}
		return makePrivate(target, isParent)
	case mode&0o022 != 0 && (mode&fs.ModeSticky == 0 || !isParent):
		return fmt.Errorf("%s can be changed by other users", path)
	}
	return nil
}

func (s *spool) close() {
	s.f.Close() // a nil file does not mind
	s.folder.Close()
}

// isOutdated reports whether the file is to be written anew: its end may be torn, or the
// clock was set, and the times in it are wrong.
func (s *spool) isOutdated(now clocks) bool {
	return s.written.boot == "" || s.size > 0 && s.written.corrected(now) != s.written.wall
}

// append adds records at the end of the file.
func (s *spool) append(records []byte, sync bool) error {
	n, err := s.f.WriteAt(records, int64(s.size))
	s.size += n
	if err == nil && sync {
		err = s.f.Sync()
	}
	return err
}

// rewrite replaces the file by one of these readings alone. At every moment the old
// file or the new one is there, whole.
func (s *spool) rewrite(all []*pendingReading, now clocks) error {
	if len(all) == 0 { // which takes no space on the disk
		s.size = 0
		return errors.Join(s.f.Truncate(0), s.f.Sync())
	}
	next := filepath.Join(s.dir, spoolNext)
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	out, size := bufio.NewWriter(f), 0
	for _, p := range all {
		n, _ := out.WriteString(readingRecord(p, now)) // Flush returns the error
		size += n
	}
	if err = errors.Join(out.Flush(), f.Sync()); err == nil {
		err = os.Rename(next, s.file())
	}
	if err != nil {
		f.Close()
		os.Remove(next)
		return err
	}
	s.f.Close()
	s.f, s.size = f, size
	return syncFile(s.folder)
}

// read reads the records of a spool and returns the readings that are not marked. Of
// those of a ticket it returns the newest one alone.
func (s *spool) read(r io.Reader) (found []*pendingReading, err error) {
	done, newest := make(map[uint64]bool), make(map[any]uint64) // by number; the latest number, by ticket
	lines := bufio.NewReaderSize(r, maxRecord)
	for err == nil || errors.Is(err, bufio.ErrBufferFull) { // a longer line is damaged, each piece of it
		var line []byte
		line, err = lines.ReadSlice('\n')
		s.size += len(line)
		if len(line) == 0 || line[0] == '\n' {
			continue
		}
		p, ok := parseRecord(strings.TrimSuffix(string(line), "\n"))
		switch {
		case !ok:
			s.damaged++
		case p.ticket == nil:
			done[p.record] = true
		default:
			found = append(found, p)
			newest[p.ticket] = p.record
		}
		s.last = max(s.last, p.record)
	}
	if !errors.Is(err, io.EOF) {
		return nil, err
	}
	return slices.DeleteFunc(found, func(p *pendingReading) bool {
		return done[p.record] || newest[p.ticket] != p.record
	}), nil
}

// parseRecord parses a line of a spool, without its end, and reports whether it
// is a record. A mark comes back as a reading without a ticket.
func parseRecord(line string) (p *pendingReading, ok bool) {
	p, ok = &pendingReading{size: len(line) + 1}, true
	_, text, _ := strings.Cut(line, " ")
	words := strings.SplitN(text, " ", 9)       // r number boot age clock code value type ticket
	words = append(words, make([]string, 8)...) // a word that is missing is no number, no value and no ticket
	check := func(err error) { ok = ok && err == nil }
	number := func(i int) int64 {
		n, err := strconv.ParseInt(words[i], 10, 64)
		check(err)
		return n
	}
	kind, value, ticket := words[0], words[6], words[8]
	if line+"\n" != withChecksum(text) || kind != "r" && kind != "d" && kind != "c" {
		return p, false
	}
	p.record = uint64(max(0, number(1)))
	if kind != "r" {
		return p, ok
	}
	p.code = int(number(5))
	p.taken = clocks{time.UnixMilli(number(4)), time.Duration(number(3)) * time.Millisecond, words[2]}
	var err error
	if value != "-" {
		p.value = value
		_, err = parseDecimal(value)
		check(err)
	}
	if words[7] == "string" {
		ticket, err = strconv.Unquote(ticket)
		check(err)
	}
	p.ticket, err = scalar(words[7], ticket)
	check(err)
	p.ticket, err = ticketOf(p.ticket)
	check(err)
	return p, ok && p.record > 0
}

// readingRecord returns the record of a reading, with its time corrected.
func readingRecord(p *pendingReading, now clocks) string {
	at, value := p.taken, p.value
	if value == "" {
		value = "-"
	}
	kind, ticket := describe(p.ticket)
	if kind == "string" {
		ticket = strconv.QuoteToASCII(ticket)
	}
	return withChecksum(fmt.Sprintf("r %d %s %d %d %d %s %s %s", p.record, at.boot, at.age.Milliseconds(),
		at.corrected(now).UnixMilli(), p.code, value, kind, ticket))
}

func markRecord(number uint64) string { return withChecksum(fmt.Sprintf("d %d", number)) }

func withChecksum(text string) string {
	return fmt.Sprintf("%08x %s\n", crc32.ChecksumIEEE([]byte(text)), text)
}

// ticketText returns a ticket for the log.
func ticketText(ticket any) string {
	kind, text := describe(ticket)
	switch kind {
	case "nil":
		return "no ticket"
	case "string":
		text = cut(text)
	}
	return "ticket " + text
}

// A clocks is one moment by all clocks of the box.
type clocks struct {
	wall time.Time     // what the clock showed, which may have been wrong
	age  time.Duration // since boot, in suspend as well
	boot string        // names the boot
}

// clockStep is how much the clock must be off before it counts as set: less may
// be the correction of a clock that runs slow.
const clockStep = 2 * time.Second

// corrected returns what the clock would have shown at c if it had been as right as it is
// now: what it shows now, less the time that passed. A box without a battery clock boots
// in 1970. If c is of another boot, nothing is known, and c.wall counts.
func (c clocks) corrected(now clocks) time.Time {
	t := now.wall.Add(c.age - now.age)
	if c.boot != now.boot || c.age > now.age || t.Sub(c.wall).Abs() < clockStep {
		return c.wall
	}
	return t
}

// systemClocks returns a function that reads the clocks of the box. Where nothing
// names the boot, each process counts as one.
func systemClocks() func() clocks {
	boot := fmt.Sprintf("%08x", rand.Uint32())
	if id, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil && len(id) >= len(boot) {
		boot = string(id[:len(boot)])
	}
	return func() clocks { return clocks{time.Now().Round(0), sinceBoot(), boot} }
}

// sinceBoot returns the time since boot, in suspend as well: by CLOCK_BOOTTIME or,
// on Linux before 2.6.39, in whole seconds.
func sinceBoot() time.Duration {
	const bootTime = 7
	var t syscall.Timespec
	if _, _, errno := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, bootTime, uintptr(unsafe.Pointer(&t)), 0); errno != 0 {
		var info syscall.Sysinfo_t
		syscall.Sysinfo(&info) // no error: the address is right
		return time.Duration(info.Uptime) * time.Second
	}
	return time.Duration(t.Nano())
}

const maxZone = 64 << 10 // bytes of a zone's file: the largest have 4 KiB

// localZone returns the zone that the box's own date shows: TZ, if it is set (the name or
// path of a zone's file, or a POSIX string such as CET-1CEST,M3.5.0,M10.5.0/3), else
// /etc/localtime, else the POSIX string in /etc/TZ (OpenWrt), else UTC. A zone that
// cannot be read is logged and counts as UTC, as it does for date.
func localZone(tz string, ok bool, etc string) *time.Location {
	if !ok {
		if zone, err := zoneFile(filepath.Join(etc, "localtime")); err == nil {
			return zone
		}
		text, _ := readSmall(filepath.Join(etc, "TZ"), maxZone) // without it, there is none
		tz = strings.TrimSpace(string(text))
	}
	tz = strings.TrimPrefix(tz, ":")
	var zone *time.Location
	var err error
	for _, load := range []func(string) (*time.Location, error){time.LoadLocation, zoneFile, posixZone} {
		if zone, err = load(tz); err == nil {
			return zone
		}
	}
	log.Printf("time zone: %v; UTC instead", err)
	return time.UTC
}

// zoneFile reads a zone's file.
func zoneFile(file string) (*time.Location, error) {
	data, err := readSmall(file, maxZone)
	if err != nil {
		return nil, err
	}
	return time.LoadLocationFromTZData("Local", data)
}

// posixZone makes a zone of a POSIX TZ string. Go reads one only as the last
// line of a TZif file (RFC 8536), so this makes one with nothing else in it.
func posixZone(tz string) (*time.Location, error) {
	const placeholder = "-00"
	const oneZone = "\x00\x00\x00\x01\x00\x00\x00\x04" // with a name of four letters
	block := "TZif2" + strings.Repeat("\x00", 15+16) + oneZone + strings.Repeat("\x00", 6) + placeholder + "\x00"
	zone, err := time.LoadLocationFromTZData("Local", []byte(block+block+"\n"+tz+"\n"))
	if err != nil {
		return nil, err
	}
	if name, _ := time.Unix(0, 0).In(zone).Zone(); name == placeholder {
		return nil, fmt.Errorf("%s is no time zone", cut(tz))
	}
	return zone, nil
}
