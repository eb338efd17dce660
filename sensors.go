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
// says on standard error why not and exits with another code. With the help
// argument (options) it prints what it can be asked.

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log"
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
	maxName      = 234                    // bytes of a sensor's name: its backup's is 21 longer, and fits 255
	maxArguments = 8 << 10                // bytes of a command's arguments, as arguments counts them
	argumentCost = 16                     // bytes of memory that an argument takes beside its own
	maxOutput    = 4 << 10                // bytes of standard output: a number has twenty, a help text a few hundred
	maxReason    = 1 << 10                // bytes of standard error that are kept, the last ones
	freeOutput   = 64 << 10               // bytes that are read at full speed, then slowRead a millisecond
	slowRead     = 32 << 10               // bytes
	helpTime     = 10 * time.Second       // that a sensor has for its help text
	badHelpTime  = time.Minute            // before a sensor that gave none is asked again
	killTime     = 2 * time.Second        // from SIGTERM to SIGKILL, and from SIGKILL to giving up
	pipeTime     = 200 * time.Millisecond // to read the rest, where a process outside the group holds a pipe open
	startTries   = 100                    // of a sensor that is just being written or replaced
	startPause   = 10 * time.Millisecond  // between two of them
	orphanTime   = time.Second            // before orphans are looked for without a signal
)

const (
	noHelp      = "no help: "   // begins the text of a sensor that did not give one
	interrupted = "interrupted" // why a run ended that went on when the agent had to end
)

// Exit codes that the agent itself stores for a run, beside the sensor's own
// and minus the signal that ended it.
const (
	codeNoNumber   = 65  // exit 0, but no number
	codeNotStarted = 126 // present, but could not be started
	codeNotFound   = 127 // no such sensor
)

// Sensors is a directory of sensors and how they are run.
type sensors struct {
	path, executable, help string
	timeout                time.Duration       // of one run
	credential             *syscall.Credential // nil: as the agent
	env                    []string
	*runState
}

// A runState is what sensors do at present. It stays when the settings change.
type runState struct {
	listing  chan struct{}        // holds an element while somebody uses helps
	helps    map[string]helpEntry // by sensor
	watch    sync.Once            // has signals sent
	signals  chan os.Signal       // SIGCHLD
	starting sync.RWMutex         // held for reading while a process starts and its number is not known yet

	mu        sync.Mutex // guards what is below
	processes map[*process]bool
	signalled chan struct{} // closed, and made anew, at a SIGCHLD
}

// A process runs a sensor.
type process struct {
	sensor string
	pid    int           // 0 before it has started
	stuck  bool          // SIGKILL did not end it
	ended  chan struct{} // closed when its run is over
}

// A helpEntry is a help text that need not be asked for again.
type helpEntry struct {
	file  os.FileInfo // of the executable that gave it
	asked string      // the argument
	text  string
	until time.Time // zero: until the file changes
}

// newSensors returns the sensors of a directory. They run as user or, where
// that is nil, as the agent does.
func newSensors(path, executable, help string, timeout time.Duration, user *account) *sensors {
	s := &sensors{
		path: path, executable: executable, help: help, timeout: timeout, env: sensorEnv(user),
		runState: &runState{
			listing: make(chan struct{}, 1), helps: make(map[string]helpEntry), signals: make(chan os.Signal, 1),
			processes: make(map[*process]bool), signalled: make(chan struct{}),
		},
	}
	if user != nil {
		s.credential = user.credential
	}
	return s
}

// sensorEnv returns the environment of a sensor: the agent's own, with a
// decimal point that is a point, and with the home of the user it runs as. Of
// two values of a variable the last one counts.
func sensorEnv(user *account) []string {
	env := os.Environ()
	if all := os.Getenv("LC_ALL"); all != "" { // it would override LC_NUMERIC
		env = slices.DeleteFunc(env, func(v string) bool { return strings.HasPrefix(v, "LC_") })
		env = append(env, "LANG="+all)
	}
	env = append(env, "LC_NUMERIC=C")
	if user != nil {
		env = append(env, "HOME="+user.home, "USER="+user.name, "LOGNAME="+user.name)
	}
	return env
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

// arguments returns v as the arguments of a run: none for nil, an array's
// scalars as they stand, or the words of a string. They take 8 KiB at most,
// where each counts 16 bytes more than it has: a queue of 256 commands, which
// may hold twice as many, then takes 4 MiB.
func arguments(v any) (args []string, err error) {
	tooLong := fmt.Errorf("more than %d bytes of arguments", maxArguments)
	switch v := v.(type) {
	case nil:
	case string:
		if len(v) > maxArguments {
			return nil, tooLong
		}
		if args, err = splitWords(v); err != nil {
			return nil, err
		}
	case []any:
		if len(v)*argumentCost > maxArguments {
			return nil, tooLong
		}
		for _, e := range v {
			arg, err := argument(e)
			if err != nil {
				return nil, err
			}
			args = append(args, arg)
		}
	default:
		return nil, fmt.Errorf("arguments are an array or a string, not %s", typeName(v))
	}
	size := len(args) * argumentCost
	for _, arg := range args {
		size += len(arg)
	}
	if size > maxArguments {
		return nil, tooLong
	}
	return args, nil
}

// argument returns a scalar as one argument: numbers in decimal, booleans as
// 1 and 0.
func argument(v any) (string, error) {
	text := fmt.Sprint(v)
	switch v := v.(type) {
	case string, int, int64, dateTime:
	case float64:
		text = strconv.FormatFloat(v, 'f', -1, 64)
	case bool:
		text = map[bool]string{true: "1", false: "0"}[v]
	case []byte:
		text = string(v)
	default:
		return "", fmt.Errorf("an argument is a scalar, not %s", typeName(v))
	}
	if strings.Contains(text, "\x00") {
		return "", errors.New("an argument holds a NUL byte")
	}
	return text, nil
}

// splitWords splits a string at white space, with the quoting of a shell's
// words and nothing else of a shell: '…' is as it stands; in "…" a backslash
// escapes $ ` " \ and a newline; elsewhere it escapes anything. An escaped
// newline disappears.
func splitWords(s string) ([]string, error) {
	words := []string{}
	var word []byte
	inWord := false
	var quote byte // ' or " or, outside of both, 0
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '\\' && quote != '\'':
			i++
			switch {
			case i == len(s):
				return nil, fmt.Errorf("nothing follows the backslash in %s", cut(s))
			case s[i] == '\n':
				continue
			case quote == '"' && strings.IndexByte("$`\"\\", s[i]) < 0:
				word = append(word, '\\')
			}
			word, inWord = append(word, s[i]), true
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '\'' || c == '"'):
			quote, inWord = c, true
		case quote == 0 && (c == ' ' || c == '\t' || c == '\n' || c == '\r'):
			if inWord {
				words, word, inWord = append(words, string(word)), nil, false
			}
		default:
			word, inWord = append(word, c), true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("no closing %c in %s", quote, cut(s))
	}
	if inWord {
		words = append(words, string(word))
	}
	return words, nil
}

// names lists the sensors: the directories with the executable in them. Other
// such directories are unusable: their names are too long, or not plain text.
func (s *sensors) names() (names, unusable []string, err error) {
	entries, err := os.ReadDir(s.path)
	if err != nil {
		return nil, nil, fmt.Errorf("list sensors: %w", err)
	}
	for _, e := range entries {
		info, err := os.Stat(filepath.Join(s.path, e.Name(), s.executable))
		if err != nil || info.IsDir() || e.Name()[0] == '.' {
			continue
		}
		if name, err := sensorName(e.Name()); err == nil {
			names = append(names, name)
		} else {
			unusable = append(unusable, e.Name())
		}
	}
	return names, unusable, nil
}

// helpTexts returns the help text of each sensor, or why there is none. It asks
// one sensor after the other, while readings go on, and only those whose
// executable has changed since they were asked. Callers wait for each other, so
// that no sensor is asked twice.
func (s *sensors) helpTexts(ctx context.Context) (map[string]string, error) {
	select {
	case s.listing <- struct{}{}:
		defer func() { <-s.listing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	names, _, err := s.names()
	if err != nil {
		return nil, err
	}
	texts := make(map[string]string)
	helps := make(map[string]helpEntry)
	for _, name := range names {
		file, err := os.Stat(filepath.Join(s.path, name, s.executable))
		if err != nil {
			continue // it has just gone
		}
		h := s.helps[name]
		if !h.isOf(file) || h.asked != s.help || !h.until.IsZero() && time.Now().After(h.until) {
			h = helpEntry{file: file, asked: s.help}
			if h.text, err = s.helpText(ctx, name); err != nil {
				h.text, h.until = noHelp+err.Error(), time.Now().Add(badHelpTime)
			}
			if ctx.Err() != nil { // the sensor was interrupted
				return nil, ctx.Err()
			}
		}
		texts[name], helps[name] = h.text, h
	}
	s.helps = helps
	return texts, nil
}

// isOf reports whether the text was given by the file, as it is now.
func (h helpEntry) isOf(now os.FileInfo) bool {
	return h.file != nil && os.SameFile(h.file, now) && h.file.ModTime().Equal(now.ModTime()) &&
		h.file.Size() == now.Size() && h.file.Mode() == now.Mode()
}

// helpText asks a sensor what it can be asked.
func (s *sensors) helpText(ctx context.Context, name string) (string, error) {
	quick := *s
	quick.timeout = min(s.timeout, helpTime)
	o := quick.run(ctx, name, []string{s.help}, nil)
	text := strings.TrimSpace(string(o.output))
	switch {
	case o.code != 0:
		return "", fmt.Errorf("%s %s: %s", name, s.help, o)
	case o.tooLong:
		return "", fmt.Errorf("%s %s: more than %d bytes", name, s.help, maxOutput)
	case text == "":
		return "", fmt.Errorf("%s %s: nothing said", name, s.help)
	}
	return text, nil
}

// awaitListing waits until no help text is being asked for.
func (s *sensors) awaitListing() {
	s.listing <- struct{}{}
	<-s.listing
}

// read runs a sensor and makes a reading of it, whatever the sensor does. What
// it says on standard error is copied to stderr or, where that is nil, ends in
// the reading's reason.
func (s *sensors) read(ctx context.Context, name string, args []string, stderr io.Writer) reading {
	o := s.run(ctx, name, args, stderr)
	r := reading{code: o.code, taken: time.Now(), reason: o.reason()}
	text := strings.TrimSpace(string(o.output))
	_, err := parseDecimal(text)
	switch {
	case o.code == 0 && o.tooLong:
		r.code, r.reason = codeNoNumber, fmt.Sprintf("more than %d bytes of output", maxOutput)
	case o.code == 0 && err != nil:
		r.code, r.reason = codeNoNumber, fmt.Sprintf("not a number: %s", cut(text))
	case o.code >= 0 && err == nil && !o.tooLong:
		r.value = text
	}
	return r
}

// An outcome is how a run ended.
type outcome struct {
	code    int // the sensor's, minus the signal that ended it, or the agent's own
	output  []byte
	tooLong bool   // there was more than maxOutput
	said    []byte // on standard error
	why     string // where the code is the agent's own, or the agent ended the run
}

// String is the code and, where there is one, the reason.
func (o outcome) String() string {
	if reason := o.reason(); reason != "" {
		return fmt.Sprintf("exit %d: %s", o.code, reason)
	}
	return fmt.Sprintf("exit %d", o.code)
}

// reason says in one line why the code is not 0, as far as anybody said it.
func (o outcome) reason() string {
	said := strings.Join(strings.Fields(string(o.said)), " ")
	switch {
	case o.code == 0:
		return ""
	case o.why != "" && said != "":
		return o.why + ": " + strconv.Quote(said)
	case said != "":
		return strconv.Quote(said)
	case o.why == "" && o.code < 0:
		return "ended by " + syscall.Signal(-o.code).String()
	}
	return o.why
}

// run runs a sensor.
func (s *sensors) run(ctx context.Context, name string, args []string, stderr io.Writer) outcome {
	return s.runIn(ctx, filepath.Join(s.path, name), name, args, stderr)
}

// runIn runs the sensor in dir. It always returns: at the time-out, or when ctx
// ends, the process group gets SIGTERM and two seconds later SIGKILL. What is
// left of the group after a normal end is killed as well. A process that has
// left the group and holds a pipe open delays the end by 0.2 s at most.
func (s *sensors) runIn(ctx context.Context, dir, name string, args []string, stderr io.Writer) outcome {
	if ctx.Err() != nil {
		return outcome{code: -int(syscall.SIGTERM), why: interrupted}
	}
	p := s.begin(name)
	if p == nil {
		return outcome{code: codeNotStarted, why: "a process of an earlier run cannot be killed"}
	}
	defer close(p.ended)
	output, said := &capture{limit: maxOutput}, &capture{limit: maxReason, tail: true, copy: stderr}
	cmd, err := s.start(p, dir, args, output, said)
	if err != nil {
		s.remove(p)
		return notStarted(filepath.Join(dir, s.executable), err)
	}
	o, ended := s.await(ctx, cmd)
	if !ended {
		// It waits in the kernel, perhaps for a dead disk or network. It must neither
		// hold up other sensors nor be joined by another like it. It may still write,
		// so what was captured is left alone.
		s.mu.Lock()
		p.stuck = true
		s.mu.Unlock()
		go func() {
			s.waitEnded(context.Background(), p.pid)
			reap(cmd)
			s.remove(p)
		}()
		return o
	}
	s.remove(p)
	o.output, o.tooLong = output.kept, output.total > maxOutput
	if stderr == nil {
		o.said = said.kept
	}
	return o
}

// begin notes that a sensor runs, or returns nil where a process of it is stuck.
func (r *runState) begin(name string) *process {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p := range r.processes {
		if p.sensor == name && p.stuck {
			return nil
		}
	}
	p := &process{sensor: name, ended: make(chan struct{})}
	r.processes[p] = true
	return p
}

func (r *runState) remove(p *process) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.processes, p)
}

// running returns how many sensors run. A process that SIGKILL did not end counts.
func (r *runState) running() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.processes)
}

// retire returns a channel that is closed when all runs of a sensor are over
// that are under way now. Runs that begin later are not waited for.
func (r *runState) retire(name string) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	var runs []chan struct{}
	for p := range r.processes {
		if p.sensor == name {
			runs = append(runs, p.ended)
		}
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		for _, ended := range runs {
			<-ended
		}
	}()
	return over
}

// start starts the executable in dir. It is named relative to dir, so that it
// and its interpreter see one version even while the directory is replaced.
//
// Where the sensor is just being replaced it is tried again, for a second at
// most. So is a file that is open for writing: one just written still is for a
// moment, in a process that another goroutine is starting.
func (s *sensors) start(p *process, dir string, args []string, stdout, stderr io.Writer) (*exec.Cmd, error) {
	file := filepath.Join(dir, s.executable)
	for try := 0; ; try++ {
		cmd := &exec.Cmd{
			Path:        "./" + s.executable,
			Args:        append([]string{file}, args...),
			Dir:         dir,
			Env:         s.env,
			Stdin:       nil, // /dev/null
			Stdout:      stdout,
			Stderr:      stderr,
			SysProcAttr: &syscall.SysProcAttr{Setpgid: true, Credential: s.credential},
			WaitDelay:   pipeTime,
		}
		s.starting.RLock()
		err := cmd.Start()
		if err == nil {
			s.mu.Lock()
			p.pid = cmd.Process.Pid
			s.mu.Unlock()
		}
		s.starting.RUnlock()
		again := errors.Is(err, syscall.ETXTBSY) || errors.Is(err, syscall.ENOENT) &&
			(exists(filepath.Join(s.path, newPrefix+p.sensor)) || try < 3 && exists(file)) // it was away just now
		if !again || try == startTries {
			return cmd, err
		}
		time.Sleep(startPause)
	}
}

// notStarted returns the outcome of a run whose executable could not be started.
func notStarted(file string, err error) outcome {
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) {
		if !exists(file) {
			return outcome{code: codeNotFound, why: "no such sensor"}
		}
		err = errors.New("interpreter not found: does the file have Windows line ends?")
	}
	if cause := (*os.PathError)(nil); errors.As(err, &cause) {
		err = cause.Err // without the file's relative name
	}
	return outcome{code: codeNotStarted, why: fmt.Sprintf("start %s: %v", file, err)}
}

// await waits until a process ends, and ends it at the time-out or when ctx
// does. It reports false where not even SIGKILL ended the process.
func (s *sensors) await(ctx context.Context, cmd *exec.Cmd) (o outcome, ended bool) {
	pid := cmd.Process.Pid
	limited, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	if s.waitEnded(limited, pid) {
		return outcome{code: reap(cmd)}, true
	}
	o.why = fmt.Sprintf("timed out after %v", s.timeout)
	if ctx.Err() != nil {
		o.why = interrupted
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		o.code = -int(sig)
		syscall.Kill(-pid, sig)
		syscall.Kill(pid, sig) // it may have left its group
		patient, cancel := context.WithTimeout(context.Background(), killTime)
		defer cancel()
		if s.waitEnded(patient, pid) {
			reap(cmd)
			return o, true
		}
	}
	o.why += ", but still there"
	return o, false
}

// reap kills what is left of the process group of a child that has ended, reaps
// the child and returns its exit code, or minus the signal that ended it. In this
// order: until the child is reaped, nobody else can get the number of its group.
func reap(cmd *exec.Cmd) (code int) {
	syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	cmd.Wait() // its error is in the state, or says that somebody still holds a pipe
	if cmd.ProcessState == nil {
		return -int(syscall.SIGKILL) // nobody knows: not a success
	}
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		return -int(status.Signal())
	}
	return status.ExitStatus()
}

// waitEnded waits until a child has ended, and leaves it to be reaped. It
// reports false where ctx ends first. It blocks no thread, but looks at the child
// at each SIGCHLD. Of all that wait, one receives the signal and tells the others.
func (r *runState) waitEnded(ctx context.Context, pid int) bool {
	r.watch.Do(func() { signal.Notify(r.signals, syscall.SIGCHLD) })
	for {
		r.mu.Lock()
		signalled := r.signalled
		r.mu.Unlock()
		if ended, err := endedChild(pPid, pid); ended == pid || err != nil {
			return true
		}
		select {
		case <-r.signals:
			r.mu.Lock()
			close(r.signalled)
			r.signalled = make(chan struct{})
			r.mu.Unlock()
		case <-signalled:
		case <-ctx.Done():
			return false
		}
	}
}

// endedChild returns the number of a child that has ended and is not reaped yet:
// of one (pPid) or any (pAll). It returns 0 if none has ended, and an error if
// there is no such child.
func endedChild(which, pid int) (int, error) {
	var info [32]int32                   // siginfo_t
	const siPid = 3 + strconv.IntSize/64 // behind three ints, aligned to a word
	_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, uintptr(which), uintptr(pid),
		uintptr(unsafe.Pointer(&info)), syscall.WEXITED|syscall.WNOHANG|syscall.WNOWAIT, 0, 0)
	if errno != 0 {
		return 0, os.NewSyscallError("waitid", errno)
	}
	return int(info[siPid]), nil
}

// What endedChild looks at, from <sys/wait.h>.
const (
	pAll = 0
	pPid = 1
)

// reapOrphans reaps the processes that end up as children of process 1, until
// ctx ends. The processes of runs are left to their runs.
func (r *runState) reapOrphans(ctx context.Context) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGCHLD)
	defer signal.Stop(signals)
	again := time.NewTicker(orphanTime) // the process of a run may have come first
	defer again.Stop()
	for ctx.Err() == nil {
		for pid := r.endedOrphan(); pid > 0; pid = r.endedOrphan() {
			syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
		}
		select {
		case <-signals:
		case <-again.C:
		case <-ctx.Done():
		}
	}
}

// endedOrphan returns the number of a child that has ended and is to be reaped,
// as no run does that; 0 if there is none or if that is not known.
func (r *runState) endedOrphan() int {
	if !r.starting.TryLock() {
		return 0
	}
	defer r.starting.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, _ := endedChild(pAll, 0)
	for p := range r.processes {
		if p.pid == pid {
			return 0
		}
	}
	return pid
}

// reserveThreads makes the runtime have threads for n goroutines that block at
// the same time. They stay. Where a sensor has used up the limit of processes the
// agent would otherwise end when it needs one more.
func reserveThreads(n int) {
	var all sync.WaitGroup
	release := make(chan struct{})
	for i := 0; i < n; i++ {
		all.Add(1)
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			all.Done()
			<-release
		}()
	}
	all.Wait()
	close(release)
}

// A capture keeps part of what a process writes, the beginning or the end.
type capture struct {
	limit int
	tail  bool
	copy  io.Writer // gets all of it; nil: nobody does
	kept  []byte
	total int
}

// ReadFrom is what os/exec calls. It begins with a small buffer, as most sensors
// write a number. One that writes for ever must not cost the processor.
func (c *capture) ReadFrom(r io.Reader) (int64, error) {
	buf := make([]byte, 512)
	for {
		n, err := r.Read(buf)
		c.Write(buf[:n])
		switch {
		case errors.Is(err, io.EOF):
			return int64(c.total), nil
		case err != nil:
			return int64(c.total), err
		case c.total > freeOutput:
			buf = slices.Grow(buf, slowRead)[:slowRead]
			time.Sleep(time.Millisecond)
		}
	}
}

func (c *capture) Write(p []byte) (int, error) {
	c.total += len(p)
	c.kept = append(c.kept, p...)
	if over := len(c.kept) - c.limit; over > 0 && c.tail {
		c.kept = c.kept[over:]
	} else if over > 0 {
		c.kept = c.kept[:c.limit]
	}
	if c.copy != nil {
		c.copy.Write(p) // who does not want it does not end the run
	}
	return len(p), nil
}

// A command is what the monitor asks: a reading, or a change of the agent.
type command struct {
	change string // "" for a reading
	ticket any    // int, int64 or string; nil where a change has none
	sensor string
	args   []string
	from   string // who asks: they take turns
}

// sameWork reports whether two commands ask the same, perhaps under two tickets.
func (c command) sameWork(d command) bool {
	return c.change == d.change && c.sensor == d.sensor && slices.Equal(c.args, d.args)
}

// A job is a command in the queue.
type job struct {
	command
	tickets  []any      // of all who asked for it
	waits    bool       // it has a place in the queue, and does not run yet
	accepted chan error // of one that waits for a place
}

// A lane is a part of the queue. Callers take turns, and the commands of each
// are in the order they came.
type lane struct {
	limit   int // of running
	running int
	runs    map[string]int // of running, those of a sensor
	waiting int
	callers []string          // who has commands that wait, the next one first
	lines   map[string][]*job // by caller
}

func newLane(limit int) lane {
	return lane{limit: limit, runs: make(map[string]int), lines: make(map[string][]*job)}
}

// mayRun reports whether a command for a sensor can run now. One slot of several
// is kept from each sensor, so that one that hangs does not stop the others.
func (l *lane) mayRun(sensor string) bool {
	return l.running < l.limit && (l.limit == 1 || l.runs[sensor] < l.limit-1)
}

func (l *lane) push(j *job) {
	if len(l.lines[j.from]) == 0 {
		l.callers = append(l.callers, j.from)
	}
	l.lines[j.from] = append(l.lines[j.from], j)
	l.waiting++
	j.waits = true
}

// next takes the command that is to run next, the oldest that may of the caller
// whose turn it is; nil if there is none.
func (l *lane) next() *job {
	for i, caller := range l.callers {
		line := l.lines[caller]
		k := slices.IndexFunc(line, func(j *job) bool { return l.mayRun(j.sensor) })
		if k < 0 {
			continue
		}
		j := line[k]
		l.callers = slices.Delete(l.callers, i, i+1)
		if l.lines[caller] = slices.Delete(line, k, k+1); len(line) > 1 {
			l.callers = append(l.callers, caller)
		} else {
			delete(l.lines, caller)
		}
		l.waiting--
		l.running++
		l.runs[j.sensor]++
		j.waits = false
		return j
	}
	return nil
}

// done notes that a command of the lane does not run any more.
func (l *lane) done(j *job) {
	l.running--
	if l.runs[j.sensor]--; l.runs[j.sensor] == 0 {
		delete(l.runs, j.sensor)
	}
}

// A queue runs commands and delivers one reading for each ticket. Readings and
// changes have a lane each, so that an update over a bad link does not hold up
// what is measured. No caller can keep others out by filling it: who has less
// than a quarter of it waiting finds room up to twice its size.
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
	active   map[any]*job    // waiting or running, by ticket
	latest   map[string]*job // the last change of each sensor
	outside  []*job          // those for whom there is no room, oldest first
	closed   bool
}

// newQueue returns a queue in which so many readings run at once, and one change.
func newQueue(concurrency, size int, run func(context.Context, command) reading,
	deliver func(any, reading), discard func(any)) *queue {
	ctx, cancel := context.WithCancel(context.Background())
	return &queue{
		run: run, deliver: deliver, discard: discard, ctx: ctx, cancel: cancel,
		size: size, readings: newLane(concurrency), changes: newLane(1),
		active: make(map[any]*job), latest: make(map[string]*job),
	}
}

// resize changes how many readings run at once and how many commands wait.
func (q *queue) resize(concurrency, size int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.readings.limit, q.size = concurrency, size
	q.start(&q.readings)
	q.admitOutside()
}

// count is how many commands wait.
func (q *queue) count() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.readings.waiting + q.changes.waiting
}

// accept takes a command on, and waits for room until the deadline or the end of
// ctx, first come, first served. Its error is a fault.
//
// A command with the ticket of an equal one that waits or runs is that one. Any
// other command with a known ticket takes the ticket away: the monitor has given
// it to two commands, and only the later one's reading is delivered.
func (q *queue) accept(ctx context.Context, c command, deadline time.Time) error {
	j := &job{command: c, tickets: []any{c.ticket}}
	q.mu.Lock()
	admitted, err := q.admit(j)
	if admitted || err != nil {
		q.mu.Unlock()
		return err
	}
	j.accepted = make(chan error, 1)
	q.outside = append(q.outside, j)
	q.mu.Unlock()
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	select {
	case err := <-j.accepted:
		return err
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.Index(q.outside, j)
	if i < 0 {
		return <-j.accepted
	}
	q.outside = slices.Delete(q.outside, i, i+1)
	return faultf(faultBusy, "the queue of %d commands is full", q.size)
}

// admit gives a command a place in the queue, or reports false if there is no room.
func (q *queue) admit(j *job) (bool, error) {
	l, known, ticket := &q.readings, q.active[j.ticket], j.ticket
	if j.change != "" {
		l = &q.changes
	}
	switch latest := q.latest[j.sensor]; {
	case q.closed:
		return false, faultf(faultBusy, "the agent is shutting down")
	case known != nil && known.sameWork(j.command):
		return true, nil
	case j.change != "" && latest != nil && latest.waits && latest.sameWork(j.command):
		latest.tickets = append(latest.tickets, ticket) // not past another change of the sensor
		j = latest
	case j.change == "" && known != nil && known.waits && known.change == "":
		known.sensor, known.args = j.sensor, j.args // nobody wants the other reading
		j = known
	case l.mayRun(j.sensor), l.waiting < q.size, l.waiting < 2*q.size && len(l.lines[j.from]) < max(1, q.size/4):
		l.push(j)
		if j.change != "" {
			q.latest[j.sensor] = j
		}
	default:
		return false, nil
	}
	if ticket != nil {
		q.active[ticket] = j
		q.discard(ticket)
	}
	q.start(l)
	return true, nil
}

// admitOutside gives places to those who wait for one, as far as there is room.
func (q *queue) admitOutside() {
	q.outside = slices.DeleteFunc(q.outside, func(j *job) bool {
		admitted, err := q.admit(j)
		if admitted || err != nil {
			j.accepted <- err
		}
		return admitted || err != nil
	})
}

// start runs commands of a lane, as many as may.
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
	l.done(j)
	if q.latest[j.sensor] == j {
		delete(q.latest, j.sensor)
	}
	next := l.next()
	q.admitOutside()
	return next
}

// deliverAll delivers the reading of a command under each of its tickets that
// was not given to another.
func (q *queue) deliverAll(j *job, r reading) {
	for _, ticket := range j.tickets {
		if q.active[ticket] == j {
			delete(q.active, ticket)
			q.deliver(ticket, r)
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
		for _, caller := range l.callers {
			for _, j := range l.lines[caller] {
				q.deliverAll(j, reading{code: -int(syscall.SIGTERM), taken: time.Now(), reason: "the agent ends"})
			}
		}
		l.callers, l.lines, l.waiting = nil, nil, 0
	}
	q.admitOutside() // which refuses them
	q.mu.Unlock()
	stop := context.AfterFunc(ctx, q.cancel)
	defer stop()
	q.work.Wait()
	q.cancel()
}

// A cond is a sync.Cond whose wait ends with a context.
type cond struct {
	sync.Mutex
	woken chan struct{} // nil: nobody waits
}

// wait unlocks the mutex until broadcast is called or ctx ends; it returns the
// error of ctx. The mutex is locked again when it returns.
func (c *cond) wait(ctx context.Context) error {
	if c.woken == nil {
		c.woken = make(chan struct{})
	}
	woken := c.woken
	c.Unlock()
	defer c.Lock()
	select {
	case <-woken:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// broadcast wakes everybody who waits. The mutex is locked.
func (c *cond) broadcast() {
	if c.woken != nil {
		close(c.woken)
		c.woken = nil
	}
}

const (
	maxKept     = 1024            // readings kept in memory alone for a monitor that is away
	maxBackoff  = 5 * time.Minute // between two attempts to reach it
	maxTries    = 3               // of a reading that the monitor answers with a fault
	faultFactor = 10              // a fault waits so much longer than a monitor that is away: a locked database takes its time
	lastTime    = time.Second     // for an attempt when the agent ends
	lastMisses  = 4               // after so many then, one after the other, the monitor counts as away
	roomForRuns = 64              // readings of those that run when no more may begin
	spoolRetry  = time.Minute     // before a spool that cannot be written is tried again
	marksAtOnce = 64              // delivered readings that are marked in the spool in one go
	markTime    = time.Second / 10
	spoolTime   = 5 * time.Second // for the last of it when the agent ends
)

// A reading is what one run of a sensor came to.
type reading struct {
	code   int       // 0, or why there is no number
	value  string    // the sensor's own digits; "" where there is no number
	taken  time.Time // with the monotonic clock's reading, unless it is of an earlier boot
	reason string    // for the log, where the code is not 0; never sent
}

// An undelivered is a reading that the monitor does not have yet.
type undelivered struct {
	reading
	ticket    any       // int, int64 or string, as the monitor sent it
	missed    int       // attempts that found the monitor away
	faults    int       // attempts that the monitor answered with a fault
	notBefore time.Time // the next attempt
	sending   bool
	last      bool   // its attempt when the agent ends has begun
	discarded bool   // not to be kept if this attempt fails
	earlier   bool   // taken in an earlier boot: the time has no monotonic clock
	toSave    bool   // on its way to the spool, or there
	record    uint64 // its number in the spool; 0 where it is not there
	gone      bool   // it is undelivered no more
}

// A delivery hands readings in at the monitor with cmd_store_probe_data, the
// oldest first and one at a time: old monitors serve one connection, and the
// next one only when that is closed. Once the monitor is back, those that had to
// wait take turns with fresh ones. A reading leaves the delivery when the
// monitor has taken it, has answered three times with a fault or has given
// its ticket away again, and when there is no more room: for 1,024 in memory,
// and for what the spool holds.
//
// With a spool, a reading that the monitor did not take at the first attempt,
// and each one while it is away or the agent ends, is on the disk as soon as
// that allows.
type delivery struct {
	clock   func(now time.Time) time.Time // what the box's clock shows: now itself, but for tests
	retry   time.Duration                 // before the second attempt; doubled from then on, up to 5 minutes
	cancel  context.CancelFunc
	done    chan struct{} // closed when nothing is sent any more
	saved   chan struct{} // closed when nothing is written to the spool any more
	dropped logLimit

	mu       sync.Mutex // guards what is below
	zone     *time.Location
	noValue  string // sent where there is no number
	client   *client
	changed  *sync.Cond     // what may be sent, or how much room there is
	kept     []*undelivered // oldest first
	old      int            // of them, those that had to wait while the monitor was away
	turn     bool           // the next attempt is with a fresh one, if there is any
	away     time.Time      // since when the monitor has been away; zero when it is not
	missed   int            // attempts since then
	probeAt  time.Time      // the next one
	outage   time.Duration  // how long the monitor had been away; zero once the old ones are through
	caughtUp int            // delivered since then
	last     bool           // what comes now is the last: not limited, and to be saved at once
	closing  bool
	abort    context.CancelFunc // of the attempt under way
	totals   deliveryTotals

	spool    *spool         // nil: readings are in memory alone
	inSpool  int            // of kept, those that are in the spool
	held     int64          // bytes of those that are or will be in the spool
	unsaved  []*undelivered // to be written to the spool
	marks    []uint64       // records to be marked as delivered
	marksBy  time.Time      // when the first of them is due
	syncMark bool           // one of them must not come back after a power cut
	sealed   bool           // nothing more will come
	respool  func()         // changes the spool; for the goroutine that writes it
	retired  []*spool       // hold what the new one does not have yet
	toWrite  *sync.Cond     // any of these
}

// DeliveryTotals count since the start of the agent.
type deliveryTotals struct {
	delivered, dropped int
	latest             time.Time // the latest delivery
	spoolBytes         int64     // at present
}

// newDelivery returns a delivery that is at work until close. What the spool
// holds (nil: there is none) is the oldest to deliver.
func newDelivery(c *client, zone *time.Location, noValue string, retry time.Duration, s *spool) *delivery {
	ctx, cancel := context.WithCancel(context.Background())
	d := &delivery{
		client: c, zone: zone, noValue: noValue, clock: func(now time.Time) time.Time { return now }, retry: retry, cancel: cancel,
		done: make(chan struct{}), saved: make(chan struct{}), dropped: logLimit{burst: 20, perSecond: 0.2}, spool: s,
	}
	d.changed, d.toWrite = sync.NewCond(&d.mu), sync.NewCond(&d.mu)
	if s != nil {
		d.load()
	}
	go func() {
		defer close(d.done)
		for u, c := d.next(); u != nil; u, c = d.next() {
			d.settle(u, c, d.attempt(ctx, u, c))
		}
	}()
	go func() {
		defer close(d.saved)
		for w, more := d.awaitSpoolWork(); more; w, more = d.awaitSpoolWork() {
			d.writeSpool(w)
		}
		for _, r := range d.retired {
			log.Printf(severe+"spool %s: left as it was: the one that takes its place could not be written", r.file())
			r.close()
		}
		if d.spool != nil {
			d.spool.close()
		}
	}()
	return d
}

// configure has readings sent as these settings have it from now on, at once
// where they could not be before.
func (d *delivery) configure(c *client, zone *time.Location, noValue string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.zone, d.noValue = zone, noValue
	d.callFrom(c)
}

func (d *delivery) callFrom(c *client) {
	moved := d.client.url.String() != c.url.String()
	d.missed, d.probeAt = 0, time.Time{}
	if moved {
		if !d.away.IsZero() {
			log.Printf(notice+"monitor %s: no longer the monitor, after %s away", d.client.url.Redacted(), age(time.Since(d.away)))
		}
		d.reportBack()
		d.away, d.outage = time.Time{}, 0
		for _, u := range d.kept {
			u.missed, u.faults, u.notBefore = 0, 0, time.Time{}
		}
	}
	d.client.close()
	d.client = c
	d.changed.Broadcast()
}

// put takes a reading to deliver. It never blocks.
func (d *delivery) put(ticket any, r reading) {
	d.mu.Lock()
	defer d.mu.Unlock()
	limit := maxKept
	if d.away.IsZero() { // waitRoom limits those behind the ones that had to wait
		limit = 2 * maxKept
	}
	if len(d.kept)-d.inSpool >= limit && !d.last {
		d.dropOldest(func(u *undelivered) bool { return u.record == 0 }, fmt.Sprintf("more than %d undelivered", limit))
	}
	u := &undelivered{reading: r, ticket: ticket}
	d.kept = append(d.kept, u)
	if d.last || !d.away.IsZero() {
		d.save(u)
	}
	d.changed.Broadcast()
}

// dropOldest gives up the oldest reading that may be, if there is one.
func (d *delivery) dropOldest(may func(*undelivered) bool, why string) *undelivered {
	i := slices.IndexFunc(d.kept, func(u *undelivered) bool { return !u.sending && may(u) })
	if i < 0 {
		return nil
	}
	u := d.kept[i]
	d.remove(u)
	d.totals.dropped++
	d.dropped.printf(warning+"%s: reading dropped: the oldest of %s", ticketText(u.ticket), why)
	return u
}

// save has a reading written to the spool.
func (d *delivery) save(u *undelivered) {
	if d.spool != nil && !u.toSave && !u.gone {
		u.toSave = true
		d.held += u.length()
		if len(d.unsaved) > 2*maxKept { // a disk that hangs
			d.unsaved = slices.DeleteFunc(d.unsaved, func(u *undelivered) bool { return u.gone })
		}
		d.unsaved = append(d.unsaved, u)
		d.toWrite.Signal()
	}
}

func (d *delivery) saveAll() {
	for _, u := range d.kept {
		d.save(u)
	}
}

// putLast lets more than 1,024 readings in from now on: when the agent ends,
// those of the commands that waited must not push out what was measured. All
// go to the spool at once: an init may not wait for long.
func (d *delivery) putLast() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = true
	d.saveAll()
	d.changed.Broadcast()
}

// waitRoom waits while the monitor is there, but slower than the sensors: then
// it is the dispatcher that has to wait, and nothing is dropped.
func (d *delivery) waitRoom(ctx context.Context) {
	stop := context.AfterFunc(ctx, d.wake)
	defer stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.kept)-d.old >= maxKept-roomForRuns && d.away.IsZero() && !d.last && !d.closing && ctx.Err() == nil {
		d.changed.Wait()
	}
}

// wake has everybody who waits look again.
func (d *delivery) wake() {
	d.mu.Lock() // not before Wait waits
	defer d.mu.Unlock()
	d.changed.Broadcast()
	d.toWrite.Signal()
}

// discard forgets an undelivered reading: the monitor has given its ticket
// away again.
func (d *delivery) discard(ticket any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := 0; i < len(d.kept); i++ {
		u := d.kept[i]
		if u.ticket != ticket || u.discarded {
			continue
		}
		if u.discarded = true; !u.sending {
			d.remove(u)
			i--
		}
		d.dropped.printf("%s: reading discarded: the ticket was given away again", ticketText(ticket))
	}
}

// count is how many readings are undelivered, and what has become of the others.
func (d *delivery) count() (undelivered int, t deliveryTotals) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.kept), d.totals
}

// remove forgets a reading, and has its record marked.
func (d *delivery) remove(u *undelivered) {
	i := slices.Index(d.kept, u)
	if i < 0 {
		return
	}
	if i == 0 {
		d.kept[0] = nil
		d.kept = d.kept[1:] // a backlog of thousands leaves from here
	} else {
		d.kept = slices.Delete(d.kept, i, i+1)
	}
	if i < d.old {
		d.old--
	}
	u.gone = true
	if u.toSave {
		d.held -= u.length()
		if d.held == 0 && d.spool != nil {
			d.spool.retryAt = time.Time{} // to empty a file takes no room
			d.toWrite.Signal()
		}
	}
	if u.record != 0 {
		d.inSpool--
		d.mark(u)
	}
	d.changed.Broadcast()
}

// mark has the record of a reading that is gone marked in the spool.
func (d *delivery) mark(u *undelivered) {
	d.marks = append(d.marks, u.record)
	d.syncMark = d.syncMark || u.discarded
	if len(d.marks) == 1 {
		d.marksBy = time.Now().Add(markTime)
	}
	if len(d.marks) == 1 || d.marksDue() {
		d.toWrite.Signal()
	}
}

// marksDue reports whether marks are to be written now: a backlog's are written
// in batches.
func (d *delivery) marksDue() bool {
	return len(d.marks) >= marksAtOnce || len(d.marks) > 0 && (d.inSpool == 0 || d.syncMark || d.sealed || !time.Now().Before(d.marksBy))
}

// monitor is the client of the monitor that readings go to.
func (d *delivery) monitor() *client {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.client
}

// moveTo has readings go to another monitor from now on, those that are kept
// too, and at once; unless they go to somebody else than before by now, which it
// reports.
func (d *delivery) moveTo(before, c *client) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.client != before {
		return false
	}
	d.callFrom(c)
	return true
}

// next waits for a reading that may be sent now, and says to whom. It returns
// nil when the delivery closes and there is none.
func (d *delivery) next() (*undelivered, *client) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		u, at := d.pick(time.Now())
		switch {
		case u != nil:
			u.sending = true
			return u, d.client
		case d.closing:
			return nil, nil
		}
		d.waitUntil(d.changed, at)
	}
}

// waitUntil waits for a signal or a moment (zero: none). The mutex is held.
func (d *delivery) waitUntil(signal *sync.Cond, at time.Time) {
	if !at.IsZero() {
		defer time.AfterFunc(time.Until(at), d.wake).Stop()
	}
	signal.Wait()
}

// pick chooses the reading to send now, or says when there may be one (zero:
// nobody knows). It is the oldest, or in turn with those that had to wait the
// oldest fresh one. While the monitor is away, or the agent ends, every second
// attempt is made with the newest, and no reading is tried much more often than
// others: one that the monitor always chokes on must not hold up the rest.
func (d *delivery) pick(now time.Time) (best *undelivered, at time.Time) {
	away := !d.away.IsZero()
	if away && now.Before(d.probeAt) {
		return nil, d.probeAt
	}
	from := 0
	if d.turn && !away && !d.closing && len(d.kept) > d.old {
		from = d.old
	}
	for i := range d.kept {
		u := d.kept[(i+from)%len(d.kept)]
		switch {
		case now.Before(u.notBefore):
			if at.IsZero() || u.notBefore.Before(at) {
				at = u.notBefore
			}
		case !away && !d.closing:
			d.turn = !d.turn
			return u, at
		case best == nil, d.closing && u.missed < best.missed, away && u.missed/8 < best.missed/8, away && !d.closing && d.missed%2 == 0:
			best = u
		}
	}
	return best, at
}

// attempt tries to deliver one reading; when the agent ends, not for long.
func (d *delivery) attempt(ctx context.Context, u *undelivered, c *client) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.mu.Lock()
	d.abort = cancel
	u.last = d.closing
	zone, value := d.zone, u.value
	if value == "" {
		value = d.noValue
	}
	d.mu.Unlock()
	if u.last {
		defer time.AfterFunc(lastTime, cancel).Stop()
	}
	now := time.Now()
	taken := takenAt(u.taken, now, d.clock(now)).In(zone)
	_, err := c.call(ctx, "cmd_store_probe_data", u.ticket, []any{u.code, value}, dateTime(taken.Format(dateTimeLayout)))
	return err
}

// clockStep is how much the clock must be off before it counts as set: less may
// be the correction of a clock that runs slow.
const clockStep = 2 * time.Second

// takenAt is when a reading was taken by a clock that shows wall now: what the
// clock showed then or, where it was set since, as on a box that boots in 1970,
// now less the reading's age by the monotonic clock.
func takenAt(taken, now, wall time.Time) time.Time {
	t, shown := wall.Add(-now.Sub(taken)), taken.Round(0)
	if t.Sub(shown).Abs() < clockStep {
		return shown
	}
	return t
}

// settle notes how an attempt ended.
func (d *delivery) settle(u *undelivered, c *client, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer d.changed.Broadcast()
	u.sending = false
	now := time.Now()
	var f *fault
	switch {
	case err == nil:
		d.reached(now)
		d.totals.delivered++
		d.totals.latest = now
		if d.outage > 0 {
			d.caughtUp++
		}
		d.remove(u)
	case c != d.client: // which is no longer the monitor
		d.save(u)
	case errors.As(err, &f):
		d.reached(now)
		u.faults++
		u.notBefore = now.Add(backoff(d.retry*faultFactor, u.faults))
		d.save(u)
		if u.faults == maxTries {
			d.remove(u)
			d.totals.dropped++
			d.dropped.printf(warning+"%s: reading dropped: monitor %s: %v", ticketText(u.ticket), d.client.url.Redacted(), err)
		}
	default:
		d.toWrite.Signal() // the clock may have been set
		if d.away.IsZero() {
			d.reportBack()
			d.away = now
			log.Printf(warning+"monitor %s: away: %v", d.client.url.Redacted(), oneLine(err.Error()))
			d.saveAll()
		}
		d.missed++
		u.missed++
		d.probeAt = now.Add(backoff(d.retry, d.missed))
		if u.notBefore = d.probeAt; u.missed > d.missed { // it choked on this one before
			u.notBefore = now.Add(backoff(d.retry, u.missed))
		}
		if d.closing && d.missed < lastMisses { // the others still have their chance
			d.probeAt = time.Time{}
		}
		if d.closing && !u.last {
			u.notBefore = time.Time{}
		}
	}
	if u.discarded {
		d.remove(u)
	}
	if d.outage > 0 && d.old == 0 {
		d.reportBack()
	}
}

// reached notes that the monitor has answered.
func (d *delivery) reached(now time.Time) {
	if !d.away.IsZero() {
		d.outage, d.caughtUp, d.old = now.Sub(d.away), 0, len(d.kept)
	}
	d.away, d.missed = time.Time{}, 0
}

// reportBack logs the end of an outage, when those that had to wait are
// through, or never will be.
func (d *delivery) reportBack() {
	if d.outage == 0 {
		return
	}
	line := fmt.Sprintf("monitor %s: back after %s, %s delivered", d.client.url.Redacted(), age(d.outage), plural(d.caughtUp, "reading"))
	if d.old > 0 {
		line += fmt.Sprintf(", %d more to deliver", d.old)
	}
	log.Print(notice + line)
	d.outage = 0
}

// age is a duration for people: 12s, 5m7s, 3h12m.
func age(d time.Duration) string {
	if d < time.Hour {
		return d.Round(time.Second).String()
	}
	return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
}

// backoff is how long to wait after n failures: doubled each time, at most 5
// minutes, and then anything from half of that to one and a half, so that a
// thousand boxes do not all call when their monitor is back.
func backoff(first time.Duration, n int) time.Duration {
	d := maxBackoff
	if n <= 20 {
		d = min(first<<(n-1), maxBackoff)
	}
	return d/2 + time.Duration(rand.Int63n(int64(d)+1))
}

// close makes one more attempt for every reading, as long as ctx and the
// monitor allow, and then sends nothing any more. What is left is in the spool,
// if there is one.
func (d *delivery) close(ctx context.Context) {
	d.mu.Lock()
	d.closing, d.last = true, true
	d.probeAt, d.missed = time.Time{}, 0
	for _, u := range d.kept {
		u.notBefore = time.Time{}
		d.save(u)
	}
	if d.abort != nil { // an attempt may have been under way for long
		defer time.AfterFunc(lastTime, d.abort).Stop()
	}
	d.changed.Broadcast()
	d.mu.Unlock()
	stop := context.AfterFunc(ctx, d.cancel)
	defer stop()
	<-d.done
	d.cancel()
	d.client.close()
	d.mu.Lock()
	d.reportBack()
	d.sealed = true
	d.toWrite.Signal()
	d.mu.Unlock()
	select {
	case <-d.saved:
	case <-time.After(spoolTime): // a disk that hangs must not keep the process
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := len(d.kept); n > 0 {
		fate := ""
		if d.spool != nil {
			fate = fmt.Sprintf(", %d of them in the spool", d.inSpool)
		}
		log.Printf(warning+"monitor %s: %s not delivered%s", d.client.url.Redacted(), plural(n, "reading"), fate)
	}
}

// A spoolWork is what is to be written to the spool in one go.
type spoolWork struct {
	add   []*undelivered
	marks []uint64
	sync  bool
	empty bool                  // nothing in the file is undelivered any more
	all   func() []*undelivered // what is in the file and undelivered, oldest first
}

// useSpool has readings kept in another spool from now on (nil: in none), or
// in the same one with another limit. The one before is emptied as soon as the
// new one has what was in it.
func (d *delivery) useSpool(s *spool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.respool = func() { d.changeSpool(s) }
	d.toWrite.Signal()
}

func (d *delivery) changeSpool(s *spool) {
	if s != nil && d.spool != nil && s.dir == d.spool.dir {
		d.spool.limit = s.limit
		d.spool.stale = d.spool.stale || d.spool.size > s.limit
		return
	}
	if d.spool != nil && d.spool.f != nil {
		d.retired = append(d.retired, d.spool)
	}
	d.spool, d.totals.spoolBytes = s, 0
	if s != nil {
		i := slices.IndexFunc(d.retired, func(r *spool) bool { return r.dir == s.dir })
		if i >= 0 { // the file is still open, and its lock is held
			d.spool = d.retired[i]
			d.spool.limit, d.spool.err, d.spool.stale = s.limit, nil, true
			d.retired = slices.Delete(d.retired, i, i+1)
		}
	}
	d.forgetRecords()
}

// forgetRecords has all that was in the spool, or should be in one, written
// again, as the file is another.
func (d *delivery) forgetRecords() {
	d.unsaved, d.marks, d.inSpool, d.held = nil, nil, 0, 0
	for _, u := range d.kept {
		again := u.toSave || u.missed > 0 || u.faults > 0 || d.last || !d.away.IsZero()
		u.record, u.toSave = 0, false
		if again {
			d.save(u)
		}
	}
}

// awaitSpoolWork waits for something to write, and takes it. It reports false
// when the delivery is closed and there is nothing. From here on the spool is
// only used by the goroutine that calls this.
func (d *delivery) awaitSpoolWork() (w spoolWork, more bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		if d.respool != nil {
			d.respool()
			d.respool = nil
		}
		var at time.Time
		waits := len(d.unsaved) > 0 || d.marksDue()
		s := d.spool
		if s == nil || s.f != nil && s.err == nil && !s.stale && len(d.unsaved) == 0 {
			for _, r := range d.retired {
				r.retire()
			}
			d.retired = nil
		}
		switch {
		case s == nil:
		case waits || s.f == nil || s.stale || d.inSpool > 0 && s.clockStepped(d.clock):
			if s.err == nil || d.sealed && waits || !time.Now().Before(s.retryAt) {
				return d.takeSpoolWork(), true
			}
			at = s.retryAt
		case len(d.marks) > 0:
			at = d.marksBy
		}
		if d.sealed {
			return w, false
		}
		d.waitUntil(d.toWrite, at)
	}
}

// takeSpoolWork takes what is to be written. Where that is more than the spool
// may hold, the oldest go.
func (d *delivery) takeSpoolWork() spoolWork {
	for d.held > d.spool.room() {
		if d.dropOldest(func(u *undelivered) bool { return u.toSave }, "what the spool holds") == nil {
			break
		}
	}
	w := spoolWork{marks: d.marks, sync: d.syncMark}
	w.add = slices.DeleteFunc(d.unsaved, func(u *undelivered) bool { return u.gone })
	w.empty = d.inSpool == 0 && len(w.add) == 0
	w.all = func() []*undelivered {
		d.mu.Lock()
		defer d.mu.Unlock()
		return slices.DeleteFunc(slices.Clone(d.kept), func(u *undelivered) bool { return u.record == 0 })
	}
	d.unsaved, d.marks, d.syncMark = nil, nil, false
	return w
}

// writeSpool writes to the spool, and notes what has come of it.
func (d *delivery) writeSpool(w spoolWork) {
	found, fresh, err := d.spool.open()
	if err == nil && !fresh {
		err = d.spool.write(w, d.clock)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	defer d.changed.Broadcast()
	s := d.spool
	d.totals.spoolBytes = s.size
	if err != nil {
		s.stop(err)
		d.unsaved = append(slices.DeleteFunc(w.add, func(u *undelivered) bool { return u.gone }), d.unsaved...)
		d.marks = append(w.marks, d.marks...)
		d.syncMark = d.syncMark || w.sync
		if d.sealed {
			d.unsaved, d.marks = nil, nil // the process is about to end
		}
		return
	}
	s.resume()
	if fresh { // what was in another one is to be written again
		d.forgetRecords()
		d.adopt(found)
		return
	}
	for i, u := range w.add {
		u.record = s.last - uint64(len(w.add)-1-i)
		if u.gone { // meanwhile
			d.mark(u)
		} else {
			d.inSpool++
		}
	}
}

// load takes what the spool holds from the time before.
func (d *delivery) load() {
	found, _, err := d.spool.open()
	if err != nil {
		d.spool.stop(err)
		return
	}
	d.adopt(found)
	d.totals.spoolBytes = d.spool.size
}

// adopt puts readings of the time before in front of the others, but for those
// whose ticket was given away again since.
func (d *delivery) adopt(found []*undelivered) {
	taken := make(map[any]bool)
	for _, u := range d.kept {
		taken[u.ticket] = true
	}
	var kept []*undelivered
	for i := len(found) - 1; i >= 0; i-- { // the newest of a ticket is the one that counts
		u := found[i]
		if taken[u.ticket] {
			u.discarded = true
			d.mark(u)
			continue
		}
		taken[u.ticket] = true
		kept = append(kept, u)
		d.held += u.length()
	}
	slices.Reverse(kept)
	d.inSpool += len(kept)
	d.old += len(kept)
	d.kept = append(kept, d.kept...)
	if len(kept) > 0 {
		log.Printf(notice+"spool %s: %s to deliver from the time before", d.spool.file(), plural(len(kept), "reading"))
	}
}

// A spool is a file of readings that the monitor does not have yet,
// DIR/readings, one record a line, each with the CRC-32 of what follows it:
//
//	1d3f6a02 r 17 4b825dc6 81234560 1795633401250 0 0.42 int 7
//	53ab0c11 d 17
//	0be27711 c 0 4b825dc6 81299000 1795633466690
//
// r is a reading: its number, the boot it was taken in, when that was by the
// uptime and by the clock (both in milliseconds), exit code, value (- where there
// is none), the ticket's type and the ticket. d marks one as delivered. c says
// what the clock showed at some uptime: it may have been set. A torn or damaged
// line costs itself alone.
//
// The file is written only where there is something to keep, each time synced
// once; marks of delivered readings are not, so that after a power cut some may be
// delivered again. It is emptied when nothing in it is undelivered, and written
// anew without the delivered ones before it grows past its limit.
//
// It belongs to one goroutine.
type spool struct {
	dir     string
	limit   int64 // bytes
	f       *os.File
	size    int64  // bytes of the file that are whole
	last    uint64 // the highest number
	stale   bool   // it holds what is to go, without a mark
	started time.Time
	step    time.Duration // by how much the clock was set between started and the last record
	err     error         // why it cannot be used at present; logged
	retryAt time.Time
}

func newSpool(dir string, limit int64) *spool {
	return &spool{dir: dir, limit: limit, started: time.Now()}
}

func (s *spool) file() string { return filepath.Join(s.dir, "readings") }

// room is how many bytes of readings are kept: a quarter of the file is left
// for marks, so that it need not be written anew for each reading.
func (s *spool) room() int64 { return s.limit / 4 * 3 }

// stop notes that the spool cannot be used for a while.
func (s *spool) stop(err error) {
	if s.err == nil {
		log.Printf(severe+"spool %s: %v; undelivered readings are in memory alone", s.file(), err)
	}
	s.err, s.retryAt = err, time.Now().Add(spoolRetry)
}

// resume notes that it can be used.
func (s *spool) resume() {
	if s.err != nil {
		log.Printf(notice+"spool %s: works again", s.file())
	}
	s.err = nil
}

func (s *spool) close() {
	if s.f != nil {
		s.f.Close()
		s.f = nil
	}
}

// retire empties a spool for good.
func (s *spool) retire() {
	if s.f != nil {
		if err := s.empty(); err != nil {
			log.Printf(severe+"spool %s: %v; what it holds will be delivered again when it is used again", s.file(), err)
		}
	}
	s.close()
}

// drift is by how much the clock was set since the spool was made.
func (s *spool) drift(clock func(time.Time) time.Time) time.Duration {
	now := time.Now()
	return clock(now).Round(0).Sub(s.started.Round(0).Add(now.Sub(s.started)))
}

// clockStepped reports whether the clock was set since the last record.
func (s *spool) clockStepped(clock func(time.Time) time.Time) bool {
	return (s.drift(clock) - s.step).Abs() > clockStep
}

// length is about how many bytes the record of a reading has: up to 15 more
// where its number and its code are very long, for which there is room.
func (u *undelivered) length() int64 {
	return int64(75 + len(u.value) + len(wireTicket(u.ticket)))
}

// wireTicket is a ticket with its type, as a record has it.
func wireTicket(ticket any) string {
	switch t := ticket.(type) {
	case int64:
		return fmt.Sprintf("i8 %d", t)
	case string:
		return "string " + strconv.QuoteToASCII(t)
	}
	return fmt.Sprint("int ", ticket)
}

// An instant is one moment by all clocks of the box.
type instant struct {
	now  time.Time // with the monotonic clock's reading
	wall time.Time
	boot string // names this boot; "-" where that is not known
	up   int64  // milliseconds since then
}

func instantOf(clock func(time.Time) time.Time) instant {
	now := time.Now()
	at := instant{now: now, wall: clock(now), boot: "-"}
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	text, err2 := os.ReadFile("/proc/uptime")
	seconds, _, _ := strings.Cut(string(text), " ")
	up, err3 := strconv.ParseFloat(seconds, 64)
	if err == nil && err2 == nil && err3 == nil && len(id) > 8 {
		at.boot, at.up = string(id[:8]), int64(up*1000)
	}
	return at
}

func readingRecord(number uint64, u *undelivered, at instant) string {
	boot, up := at.boot, at.up-at.now.Sub(u.taken).Milliseconds()
	if u.earlier || boot == "-" {
		boot, up = "-", 0
	}
	value := u.value
	if value == "" {
		value = "-"
	}
	return summed(fmt.Sprintf("r %d %s %d %d %d %s %s", number, boot, up, takenAt(u.taken, at.now, at.wall).UnixMilli(), u.code, value, wireTicket(u.ticket)))
}

func clockRecord(at instant) string {
	return summed(fmt.Sprintf("c 0 %s %d %d", at.boot, at.up, at.wall.UnixMilli()))
}

func markRecord(number uint64) string { return summed(fmt.Sprintf("d %d", number)) }

// summed is a line with its checksum in front.
func summed(line string) string {
	return fmt.Sprintf("%08x %s\n", crc32.ChecksumIEEE([]byte(line)), line)
}

// open opens the file, unless it is open, and still the one of that name. A
// fresh one comes with the readings in it that are not marked, oldest first.
func (s *spool) open() (found []*undelivered, fresh bool, err error) {
	if s.f != nil {
		before, err := s.f.Stat()
		now, err2 := os.Lstat(s.file())
		if err == nil && err2 == nil && os.SameFile(before, now) {
			return nil, false, nil
		}
		s.close()
	}
	_, known := os.Stat(s.dir)
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, false, err
	}
	f, err := os.OpenFile(s.file(), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, false, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	if !info.Mode().IsRegular() {
		return nil, false, errors.New("not a file")
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, false, errors.New("another process uses it")
	}
	os.Remove(s.nextFile()) // of a power cut
	if err := f.Chmod(0o600); err != nil {
		return nil, false, err
	}
	if err := syncDir(s.dir); err != nil { // the file may be new
		return nil, false, err
	}
	if known != nil {
		syncDir(filepath.Dir(s.dir)) // which whoever may write there need not be able to
	}
	c, err := readSpool(f, instantOf(func(now time.Time) time.Time { return now }))
	if err != nil {
		return nil, false, err
	}
	if c.damaged > 0 {
		log.Printf(warning+"spool %s: %s passed over", s.file(), plural(c.damaged, "damaged record"))
	}
	s.f, s.size, s.last, s.stale = f, info.Size(), c.last, c.damaged > 0 || c.moved
	if c.cutOff { // what is written next begins a line
		if _, err := f.WriteAt([]byte("\n"), s.size); err == nil {
			s.size++
		} else {
			s.stale = true
		}
	}
	return c.readings, true, nil
}

func (s *spool) nextFile() string { return s.file() + ".next" }

// A spoolContent is what a spool was found to hold.
type spoolContent struct {
	readings []*undelivered // that are not marked
	last     uint64         // the highest number
	damaged  int            // lines
	cutOff   bool           // the last line has no end
	moved    bool           // the clock was set since, in this boot
}

// readSpool reads what a spool holds. A reading of this boot gets the time that
// its age by the uptime makes now; one of an earlier boot what the clock would
// have shown then had it been what it was last known to be in that boot.
func readSpool(r io.Reader, at instant) (spoolContent, error) {
	var c spoolContent
	byNumber := make(map[uint64]*spoolRecord)
	offsets := make(map[string]int64) // of a boot: the clock at its beginning, as last known
	lines := bufio.NewReaderSize(r, maxRecord)
	for {
		line, err := lines.ReadSlice('\n')
		tooLong := errors.Is(err, bufio.ErrBufferFull)
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = lines.ReadSlice('\n')
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return c, err
		}
		if len(line) > 0 {
			c.cutOff = errors.Is(err, io.EOF)
		}
		rec, ok := parseRecord(strings.TrimSuffix(string(line), "\n"))
		switch {
		case len(line) == 0 || string(line) == "\n":
		case tooLong || !ok:
			c.damaged++
		case rec.kind == "d":
			delete(byNumber, rec.number)
		default:
			if rec.boot != "-" {
				offsets[rec.boot] = rec.wall - rec.up
			}
			if rec.kind == "r" {
				byNumber[rec.number] = rec
			}
		}
		if ok {
			c.last = max(c.last, rec.number)
		}
		if err != nil {
			break
		}
	}
	for _, rec := range byNumber {
		if offset, known := offsets[rec.boot]; known {
			if stepped := rec.up + offset - rec.wall; (time.Duration(stepped) * time.Millisecond).Abs() > clockStep {
				rec.wall += stepped
			}
		}
		rec.u.taken, rec.u.earlier = time.UnixMilli(rec.wall), true
		if since := time.Duration(at.up-rec.up) * time.Millisecond; rec.boot == at.boot && rec.boot != "-" && since >= 0 { // a container may begin anew in the same boot
			exact := at.wall.Round(0).Sub(rec.u.taken)
			if (exact - since).Abs() < clockStep {
				since = exact // the uptime has hundredths only
			}
			c.moved = c.moved || since != exact
			rec.u.taken, rec.u.earlier = at.now.Add(-since), false
		}
		c.readings = append(c.readings, rec.u)
	}
	slices.SortFunc(c.readings, func(a, b *undelivered) int {
		if a.record < b.record {
			return -1
		}
		return 1
	})
	return c, nil
}

// A spoolRecord is one line of a spool.
type spoolRecord struct {
	kind     string
	number   uint64
	boot     string
	up, wall int64 // milliseconds
	u        *undelivered
}

const (
	maxRecord      = 16 << 10 // bytes of a line: a ticket of 1 KiB, quoted, and a value of 4 KiB
	maxRecordValue = 4 << 10
)

// parseRecord reads a line of a spool, without its end, and reports whether it
// is one.
func parseRecord(line string) (*spoolRecord, bool) {
	sum, rest, _ := strings.Cut(line, " ")
	if want, err := strconv.ParseUint(sum, 16, 32); err != nil || len(sum) != 8 || uint32(want) != crc32.ChecksumIEEE([]byte(rest)) {
		return nil, false
	}
	word := func() (w string) { w, rest, _ = strings.Cut(rest, " "); return w }
	bad := false
	number := func(bits int) int64 {
		n, err := strconv.ParseInt(word(), 10, bits)
		bad = bad || err != nil
		return n
	}
	rec := &spoolRecord{kind: word()}
	var err error
	rec.number, err = strconv.ParseUint(word(), 10, 64)
	if rec.kind == "d" {
		return rec, err == nil && rest == ""
	}
	rec.boot, rec.up, rec.wall = word(), number(64), number(64)
	if rec.kind == "c" {
		return rec, !bad && rest == ""
	}
	rec.u = &undelivered{record: rec.number, toSave: true}
	rec.u.code, rec.u.value = int(number(32)), word()
	if rec.u.value == "-" {
		rec.u.value = ""
	} else if _, err := parseDecimal(rec.u.value); err != nil || len(rec.u.value) > maxRecordValue {
		bad = true
	}
	switch kind := word(); kind {
	case "int":
		rec.u.ticket = int(number(32))
	case "i8":
		rec.u.ticket = number(64)
	case "string":
		var text string
		text, err = strconv.Unquote(rest)
		rec.u.ticket, rest = text, ""
	default:
		bad = true
	}
	return rec, rec.kind == "r" && err == nil && !bad && rest == "" && rec.number > 0
}

// write does the work and, where it returns nil, has it on the disk: the
// readings to add have the numbers up to the last one. Where it fails, what was
// in the file before still counts.
func (s *spool) write(w spoolWork, clock func(time.Time) time.Time) error {
	if w.empty {
		return s.empty()
	}
	var b bytes.Buffer
	for _, n := range w.marks {
		b.WriteString(markRecord(n))
	}
	stepped := s.clockStepped(clock)
	full := s.stale || s.size+int64(b.Len()) > s.limit
	if !stepped && !full && len(w.add) == 0 { // as after each delivery of a backlog
		return s.append(b.Bytes(), w.sync)
	}
	at := instantOf(clock)
	if stepped {
		b.WriteString(clockRecord(at))
	}
	last := s.last
	for _, u := range w.add {
		last++
		b.WriteString(readingRecord(last, u, at))
	}
	if full || s.size+int64(b.Len()) > s.limit {
		return s.rewrite(w, at, s.drift(clock))
	}
	if err := s.append(b.Bytes(), true); err != nil {
		return err
	}
	s.last, s.step = last, s.drift(clock)
	return nil
}

// append writes records at the end of the file, all of them or none.
func (s *spool) append(records []byte, sync bool) error {
	_, err := s.f.WriteAt(records, s.size)
	if err == nil && sync {
		err = s.f.Sync()
	}
	if err != nil {
		if s.f.Truncate(s.size) != nil { // what was half written could be taken for more
			s.stale = true
		}
		return err
	}
	s.size += int64(len(records))
	return nil
}

// empty empties the file: everything in it was delivered.
func (s *spool) empty() error {
	if err := s.f.Truncate(0); err != nil {
		return err
	}
	s.size, s.stale = 0, false
	return s.f.Sync()
}

// rewrite writes the file anew, with what is undelivered only. At every moment
// the old file or the new one is there, whole.
func (s *spool) rewrite(w spoolWork, at instant, step time.Duration) (err error) {
	next := s.nextFile()
	os.Remove(next)
	f, err := os.OpenFile(next, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(next)
		}
	}()
	syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) // nobody else knows it yet
	out, size, last := bufio.NewWriter(f), 0, s.last
	add := func(number uint64, u *undelivered) {
		n, _ := out.WriteString(readingRecord(number, u, at)) // Flush has the error
		size += n
	}
	for _, u := range w.all() {
		add(u.record, u)
	}
	for _, u := range w.add {
		last++
		add(last, u)
	}
	if err := out.Flush(); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(next, s.file()); err != nil {
		return err
	}
	s.f.Close()
	s.f, s.size, s.last, s.step, s.stale = f, int64(size), last, step, false
	if err := syncDir(s.dir); err != nil { // the old file may come back: it is as good, but for these
		log.Printf(severe+"spool %s: %v", s.file(), err)
	}
	return nil
}

// ticketText is a ticket for the log.
func ticketText(ticket any) string {
	if s, ok := ticket.(string); ok {
		return "ticket " + cut(s)
	}
	if ticket == nil {
		return "no ticket"
	}
	return fmt.Sprint("ticket ", ticket)
}

// localZone is the zone that the box's own date shows: TZ (the name or path
// of a zone's file, or a POSIX string such as CET-1CEST,M3.5.0,M10.5.0/3), else
// /etc/localtime, else the POSIX string in /etc/TZ (OpenWrt), else UTC. What
// can't be read there counts as UTC, as it does for date, and is logged.
func localZone() *time.Location {
	tz, ok := os.LookupEnv("TZ")
	return zoneOf(tz, ok, "/etc")
}

const maxZone = 64 << 10 // bytes of a zone's file: the largest have 4 KiB

func zoneOf(tz string, ok bool, etc string) *time.Location {
	if !ok {
		if data, err := readSmall(filepath.Join(etc, "localtime"), maxZone); err == nil {
			if zone, err := time.LoadLocationFromTZData("Local", data); err == nil {
				return zone
			}
		}
		text, err := readSmall(filepath.Join(etc, "TZ"), maxZone)
		if err != nil {
			return time.UTC
		}
		tz = strings.TrimSpace(string(text))
	}
	tz = strings.TrimPrefix(tz, ":")
	if strings.HasPrefix(tz, "/") {
		if data, err := readSmall(tz, maxZone); err == nil {
			if zone, err := time.LoadLocationFromTZData("Local", data); err == nil {
				return zone
			}
		}
	} else if zone, err := time.LoadLocation(tz); err == nil {
		return zone
	}
	zone, err := posixZone(tz)
	if err != nil {
		log.Printf("time zone: %v; UTC instead", err)
		return time.UTC
	}
	return zone
}

// posixZone makes a zone of a POSIX TZ string. Go reads one only as the last
// line of a TZif file (RFC 8536), so here is one with nothing else in it.
func posixZone(tz string) (*time.Location, error) {
	const placeholder = "-00"
	header := "TZif2" + strings.Repeat("\x00", 15)
	block := header + strings.Repeat("\x00\x00\x00\x00", 4) + "\x00\x00\x00\x01\x00\x00\x00\x04" + // one zone, four letters
		strings.Repeat("\x00", 6) + placeholder + "\x00"
	zone, err := time.LoadLocationFromTZData("Local", []byte(block+block+"\n"+tz+"\n"))
	if err != nil {
		return nil, err
	}
	if name, _ := time.Unix(0, 0).In(zone).Zone(); name == placeholder {
		return nil, fmt.Errorf("%s is no time zone", cut(tz))
	}
	return zone, nil
}
