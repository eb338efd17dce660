package main

// Sensors: the directory that holds them, one run of one, what a run comes
// to, and the queue that limits how many run at once.
//
// A sensor is a directory with an executable, PATH/NAME/EXECUTABLE:
//
//	$ sensors/disk/check percent /
//	61.2
//
// It is started with its arguments and never through a shell, in its own
// directory and its own process group, with LC_ALL=C and nothing on standard
// input. It prints one decimal number and exits 0, or says on standard error
// why not and exits with another code. With the help argument (options) it
// prints what it can be asked.

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	helpTime     = 10 * time.Second  // for a help text, where the time-out is longer
	badHelpTime  = time.Minute       // before a sensor without one is asked again
	maxOutput    = 4 << 10           // bytes on standard output: a number has twenty, a help text a few hundred
	maxReason    = 1 << 10           // bytes of standard error that are kept, the last
	maxName      = 255               // bytes of a sensor's name, as file systems have it
	maxArguments = 8 << 10           // bytes of a command's arguments: with a queue of 256 they are 4 MiB at most
	quickTime    = time.Second / 100 // of a run, in which a pipe takes what it writes
	freeOutput   = 64 << 10          // bytes read at full speed; what a sensor writes beyond is read 32 KiB a millisecond at most
	maxPipe      = 1 << 20           // bytes that are in a pipe, on a box with pages of 64 KiB
	killDelay    = 2 * time.Second   // from SIGTERM to SIGKILL, and from there to giving up
	shareTime    = time.Second       // to wait while another process replaces a sensor
	busyRetries  = 100               // of 10 ms, while an executable just written is still open somewhere
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
	user                   *syscall.Credential // nil: as the agent
	env                    []string
	*activity
}

// An activity is what sensors do at present. It stays where the settings change.
type activity struct {
	listing chan struct{} // is taken by who uses helps
	helps   map[string]helpEntry

	mu    sync.Mutex        // guards what is below
	stuck map[string]int    // processes of a sensor that SIGKILL did not end
	inUse map[string]*usage // sensors that run or change
	limit int               // of runs at once
	runs  int
	freed chan struct{} // closed, and made anew, when another run may begin
}

// begin waits until one more sensor may run; end tells that it has ended.
func (a *activity) begin(ctx context.Context) error {
	for {
		a.mu.Lock()
		free, freed, err := a.runs < a.limit, a.freed, ctx.Err()
		if free && err == nil {
			a.runs++
		}
		a.mu.Unlock()
		if free || err != nil {
			return err
		}
		select {
		case <-freed:
		case <-ctx.Done():
		}
	}
}

func (a *activity) end() { a.change(-1, 0) }

// setLimit changes how many sensors may run at once.
func (a *activity) setLimit(limit int) { a.change(0, limit) }

func (a *activity) change(runs, limit int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.runs += runs
	if limit > 0 {
		a.limit = limit
	}
	close(a.freed)
	a.freed = make(chan struct{})
}

// running is how many sensors run.
func (a *activity) running() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.runs
}

// A usage lets any number of runs of a sensor, or one that replaces it, go on.
type usage struct {
	sync.RWMutex
	users int // of this usage, waiting ones included
}

// A helpEntry is a help text that need not be asked for again.
type helpEntry struct {
	file  os.FileInfo // of the executable that gave it
	asked string      // the argument
	text  string
	until time.Time // zero: until the file changes
}

// newSensors returns the sensors of a directory, of which at most concurrency
// run at once.
func newSensors(path, executable, help string, timeout time.Duration, concurrency int, user *syscall.Credential) *sensors {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "LC_ALL=") })
	return &sensors{
		path: path, executable: executable, help: help, timeout: timeout, user: user,
		env: append(env, "LC_ALL=C"), // elsewhere a decimal point may be a comma
		activity: &activity{
			listing: make(chan struct{}, 1), helps: make(map[string]helpEntry),
			stuck: make(map[string]int), inUse: make(map[string]*usage), limit: concurrency, freed: make(chan struct{}),
		},
	}
}

// sensorName returns v as the name of a sensor: a string that is one plain
// path element, not hidden, of at most 255 bytes.
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
// scalars as they stand, or the words of a string.
func arguments(v any) ([]string, error) {
	args := []string{}
	switch v := v.(type) {
	case nil:
	case string:
		var err error
		if args, err = splitWords(v); err != nil {
			return nil, err
		}
	case []any:
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
	size := 0
	for _, arg := range args {
		size += len(arg) + 1
	}
	if size > maxArguments {
		return nil, fmt.Errorf("more than %d bytes of arguments", maxArguments)
	}
	return args, nil
}

// argument returns a scalar as one argument: numbers in decimal, booleans as
// 1 and 0.
func argument(v any) (string, error) {
	text := ""
	switch v := v.(type) {
	case string:
		text = v
	case int, int64, dateTime:
		text = fmt.Sprint(v)
	case float64:
		text = strconv.FormatFloat(v, 'f', -1, 64)
	case bool:
		text = "0"
		if v {
			text = "1"
		}
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

// names lists the sensors: the directories with the executable in them.
func (s *sensors) names() ([]string, error) {
	if dir, err := s.lock(context.Background(), syscall.LOCK_SH, shareTime); err == nil { // else it is somebody else's lock
		defer dir.Close()
	}
	entries, err := os.ReadDir(s.path)
	if err != nil {
		return nil, fmt.Errorf("list sensors: %w", err)
	}
	var names []string
	for _, e := range entries {
		name, err := sensorName(e.Name())
		if err != nil {
			continue
		}
		if info, err := os.Stat(filepath.Join(s.path, name, s.executable)); err == nil && !info.IsDir() {
			names = append(names, name)
		}
	}
	return names, nil
}

// helpText asks a sensor what it can be asked.
func (s *sensors) helpText(ctx context.Context, name string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, helpTime)
	defer cancel()
	o := s.run(ctx, name, []string{s.help}, nil)
	switch {
	case o.code != 0:
		return "", fmt.Errorf("%s %s: %s", name, s.help, o)
	case o.tooLong:
		return "", fmt.Errorf("%s %s: more than %d bytes", name, s.help, maxOutput)
	case len(strings.TrimSpace(string(o.output))) == 0:
		return "", fmt.Errorf("%s %s: nothing said", name, s.help)
	}
	return strings.TrimSpace(string(o.output)), nil
}

// helpTexts asks all sensors, one after the other, so that readings go on
// beside it. The text of one that does not answer says so. What is known is
// not asked for again, until the executable changes.
func (s *sensors) helpTexts(ctx context.Context) (map[string]string, error) {
	select {
	case s.listing <- struct{}{}:
		defer func() { <-s.listing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	names, err := s.names()
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
		if h.file == nil || h.asked != s.help || !sameVersion(h.file, file) || !h.until.IsZero() && time.Now().After(h.until) {
			h = helpEntry{file: file, asked: s.help}
			h.text, err = s.helpText(ctx, name)
			if ctx.Err() != nil { // whoever asked has gone: that says nothing of the sensor
				return nil, ctx.Err()
			}
			if err != nil {
				h.text, h.until = noHelp+err.Error(), time.Now().Add(badHelpTime)
			}
		}
		texts[name], helps[name] = h.text, h
	}
	s.helps = helps
	return texts, nil
}

// noHelp begins the text of a sensor that did not give one.
const noHelp = "no help: "

// awaitListing waits until no help text is being asked for.
func (s *sensors) awaitListing() {
	s.listing <- struct{}{}
	<-s.listing
}

// sameVersion reports whether a file is what it was.
func sameVersion(before, now os.FileInfo) bool {
	return os.SameFile(before, now) && before.ModTime().Equal(now.ModTime()) && before.Size() == now.Size() && before.Mode() == now.Mode()
}

// read runs a sensor and makes a reading of it. Whatever the sensor does, there
// is one. Its standard error goes to stderr or, where that is nil, in part into
// the reading's reason.
func (s *sensors) read(ctx context.Context, name string, args []string, stderr *os.File) reading {
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
	tooLong bool // there was more than maxOutput
	stderr  []byte
	why     string // where the code is the agent's own or a time-out's
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
	said := strings.Join(strings.Fields(string(o.stderr)), " ")
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

// use returns the usage of a sensor, which done gives back.
func (s *sensors) use(name string) (u *usage, done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u = s.inUse[name]
	if u == nil {
		u = &usage{}
		s.inUse[name] = u
	}
	u.users++
	return u, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if u.users--; u.users == 0 {
			delete(s.inUse, name)
		}
	}
}

// whileUnused calls replace while no run of the sensor goes on in this
// process, and none begins in any.
func (s *sensors) whileUnused(ctx context.Context, name string, replace func() error) error {
	u, done := s.use(name)
	defer done()
	u.Lock()
	defer u.Unlock()
	dir, err := s.lock(ctx, syscall.LOCK_EX, lockTime)
	if err != nil {
		return err
	}
	defer dir.Close()
	return replace()
}

// lock locks the directory of sensors until it is closed, or fails where that
// takes too long.
func (s *sensors) lock(ctx context.Context, how int, wait time.Duration) (*os.File, error) {
	dir, err := os.Open(s.path)
	if err != nil {
		return nil, err
	}
	if err := flockWithin(ctx, dir, how, wait); err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock %s: %w", s.path, err)
	}
	return dir, nil
}

// flockWithin locks an open file or directory, and waits for who else has. On a
// file system that has no locks, where nothing else could be done, it does
// nothing.
func flockWithin(ctx context.Context, f *os.File, how int, wait time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for {
		err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB)
		switch {
		case err == nil, errors.Is(err, syscall.ENOLCK), errors.Is(err, syscall.ENOTSUP), errors.Is(err, syscall.ENOSYS):
			return nil
		case !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR):
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// run runs a sensor. If another process replaces it just then, and it fails, it
// is run again when that is done.
func (s *sensors) run(ctx context.Context, name string, args []string, stderr *os.File) outcome {
	u, done := s.use(name)
	defer done()
	u.RLock()
	defer u.RUnlock()
	dir := filepath.Join(s.path, name)
	before, _ := os.Lstat(dir)
	replaced := func() bool {
		after, err := os.Lstat(dir)
		return before == nil && err == nil || before != nil && (err != nil || !os.SameFile(before, after))
	}
	o := s.runIn(ctx, dir, name, args, stderr)
	missing := o.code == codeNotFound || o.code == codeNotStarted // perhaps for an instant
	if o.code == 0 || ctx.Err() != nil || !missing && !replaced() {
		return o
	}
	locked, err := s.lock(ctx, syscall.LOCK_SH, shareTime)
	if err != nil {
		return o
	}
	defer locked.Close()
	if before == nil && !replaced() {
		return o // it is not there
	}
	return s.runIn(ctx, dir, name, args, stderr)
}

// runIn runs the sensor in dir to its end, of which there is one: at the time-out, or
// when ctx ends, its process group gets SIGTERM and two seconds later SIGKILL.
// Whatever is left of the group after a normal end is killed, too, and nobody
// who still holds the pipes is waited for.
func (s *sensors) runIn(ctx context.Context, dir, name string, args []string, stderr *os.File) outcome {
	if s.begin(ctx) != nil {
		return outcome{code: -int(syscall.SIGTERM), why: "the agent ends"}
	}
	defer s.end()
	if s.isStuck(name) {
		return outcome{code: codeNotStarted, why: "a process of an earlier run cannot be killed"}
	}
	stdout, err := newCapture(maxOutput, false)
	if err != nil {
		return outcome{code: codeNotStarted, why: err.Error()}
	}
	defer stdout.close()
	var reason *capture
	var stderrEnd uintptr
	if stderr != nil {
		stderrEnd = stderr.Fd()
	} else {
		if reason, err = newCapture(maxReason, true); err != nil {
			return outcome{code: codeNotStarted, why: err.Error()}
		}
		defer reason.close()
		stderrEnd = uintptr(reason.end)
	}
	file := filepath.Join(dir, s.executable)
	pid, err := s.start(file, args, dir, uintptr(stdout.end), stderrEnd)
	if err != nil {
		if _, absent := os.Stat(file); errors.Is(absent, os.ErrNotExist) || errors.Is(absent, syscall.ENOTDIR) {
			return outcome{code: codeNotFound, why: "no such sensor"}
		}
		return outcome{code: codeNotStarted, why: err.Error()}
	}
	stdout.begin()
	if reason != nil {
		reason.begin()
	}
	o := s.await(ctx, name, pid)
	o.output, o.tooLong = stdout.finish()
	if reason != nil {
		o.stderr, _ = reason.finish()
	}
	return o
}

// start starts a process that writes to these two files and reads nothing. It
// is what os/exec does, without what costs a tenth of a reading: the environment
// is made once, and files are not the runtime's as long as nobody waits for them.
//
// The kernel refuses to run a file that is open for writing, and a file just
// written is for a moment open in whatever process another goroutine is starting:
// that is worth a few tries.
func (s *sensors) start(file string, args []string, dir string, stdout, stderr uintptr) (pid int, err error) {
	null, err := syscall.Open(os.DevNull, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: os.DevNull, Err: err}
	}
	defer syscall.Close(null)
	args = append([]string{file}, args...)
	process := &syscall.ProcAttr{
		Dir: dir, Env: s.env, Files: []uintptr{uintptr(null), stdout, stderr},
		Sys: &syscall.SysProcAttr{Setpgid: true, Credential: s.user},
	}
	for try := 0; ; try++ {
		pid, err := syscall.ForkExec(file, args, process)
		if err == nil {
			return pid, nil
		}
		if errors.Is(err, syscall.ENOENT) {
			err = errors.New("no such file or directory (its interpreter, or a line end of DOS behind that?)")
		}
		if try == busyRetries || !errors.Is(err, syscall.ETXTBSY) {
			return 0, &os.PathError{Op: "start", Path: file, Err: err}
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// await waits for a process to end or ends it, and kills the rest of its
// group. It does so before the process is reaped: until then its number, and
// so the group's, can be nobody else's.
func (s *sensors) await(ctx context.Context, name string, pid int) outcome {
	ended := make(chan struct{})
	go func() {
		waitEnded(pid)
		close(ended)
	}()
	reap := func() (status syscall.WaitStatus) {
		syscall.Kill(-pid, syscall.SIGKILL) // who is left
		for {
			switch _, err := syscall.Wait4(pid, &status, 0, nil); {
			case err == nil:
				return status
			case !errors.Is(err, syscall.EINTR):
				return syscall.WaitStatus(syscall.SIGKILL) // nobody knows: not a success
			}
		}
	}
	timer := time.NewTimer(s.timeout)
	defer timer.Stop()
	why := ""
	select {
	case <-ended:
		status := reap()
		if status.Signaled() {
			return outcome{code: -int(status.Signal())}
		}
		return outcome{code: status.ExitStatus()}
	case <-timer.C:
		why = fmt.Sprintf("timed out after %v", s.timeout)
	case <-ctx.Done():
		why = "ended with the agent"
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			why = fmt.Sprintf("ended after %v", helpTime)
		}
	}
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		syscall.Kill(-pid, signal)
		syscall.Kill(pid, signal) // it may have left its group
		timer := time.NewTimer(killDelay)
		defer timer.Stop()
		select {
		case <-ended:
			reap()
			return outcome{code: -int(signal), why: why}
		case <-timer.C:
		}
	}
	// In the kernel, waiting for a dead disk or network. It must neither hold
	// up the others nor be joined by another like it.
	s.addStuck(name, 1)
	go func() {
		<-ended
		reap()
		s.addStuck(name, -1)
	}()
	return outcome{code: -int(syscall.SIGKILL), why: why + ", but still there"}
}

func (s *sensors) isStuck(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stuck[name] > 0
}

func (s *sensors) addStuck(name string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stuck[name] += n; s.stuck[name] == 0 {
		delete(s.stuck, name)
	}
}

// waitEnded waits until a child has ended, and leaves it to be reaped.
func waitEnded(pid int) {
	const pPid = 1 // P_PID of <sys/wait.h>
	for {
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, pPid, uintptr(pid), 0, syscall.WEXITED|syscall.WNOWAIT, 0, 0)
		if errno != syscall.EINTR {
			return
		}
	}
}

// A capture keeps part of what a process writes to a pipe: the beginning or
// the end.
type capture struct {
	pipe, end int // to read from, to write to
	limit     int
	tail      bool
	kept      []byte
	total     int64
	slow      *time.Timer
	file      chan *os.File // the pipe to read from, where the process takes longer
	done      chan struct{} // closed when it is not read while the process runs any more
}

// newCapture returns a capture of up to limit bytes.
func newCapture(limit int, tail bool) (*capture, error) {
	var pipe [2]int
	err := syscall.Pipe2(pipe[:], syscall.O_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	c := &capture{pipe: pipe[0], end: pipe[1], limit: limit, tail: tail}
	if err := syscall.SetNonblock(c.pipe, true); err != nil {
		c.close()
		return nil, os.NewSyscallError("fcntl", err)
	}
	return c, nil
}

// begin leaves the end of the pipe to a process that has it now. Most end in no
// time, and what they wrote is read then. Otherwise it is read while the process
// runs, until the pipe ends or finish is called.
func (c *capture) begin() {
	closeOnce(&c.end)
	c.file, c.done = make(chan *os.File, 1), make(chan struct{})
	c.slow = time.AfterFunc(quickTime, func() {
		defer close(c.done)
		file := os.NewFile(uintptr(c.pipe), "pipe")
		c.file <- file
		buf := make([]byte, maxOutput)
		for {
			n, err := file.Read(buf)
			c.keep(buf[:n])
			if err != nil {
				return
			}
			if c.total > freeOutput { // one that writes for ever must not cost the processor
				buf = slices.Grow(buf, freeOutput/2)[:freeOutput/2]
				time.Sleep(time.Millisecond)
			}
		}
	})
}

func (c *capture) keep(b []byte) {
	c.total += int64(len(b))
	c.kept = append(c.kept, b...)
	if over := len(c.kept) - c.limit; over > 0 && c.tail {
		c.kept = c.kept[over:]
	} else if over > 0 {
		c.kept = c.kept[:c.limit]
	}
}

// finish returns what was kept, once the process has ended, and whether there
// was more. All that the process wrote is in the pipe by then, so there is
// nothing to wait for although a grandchild may hold it open.
func (c *capture) finish() (kept []byte, more bool) {
	if !c.slow.Stop() {
		file := <-c.file
		file.SetReadDeadline(time.Unix(1, 0))
		<-c.done
		defer func() { c.pipe = -1; file.Close() }() // whose it is
	}
	buf := make([]byte, maxOutput)
	for begun := c.total; c.total-begun < maxPipe; { // somebody who is left may still write
		n, err := syscall.Read(c.pipe, buf)
		if n > 0 {
			c.keep(buf[:n])
		} else if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	return c.kept, c.total > int64(c.limit)
}

func (c *capture) close() {
	closeOnce(&c.end)
	closeOnce(&c.pipe)
}

// closeOnce closes a file, unless it has been.
func closeOnce(fd *int) {
	if *fd >= 0 {
		syscall.Close(*fd)
		*fd = -1
	}
}

// A command is what the monitor asks: a reading, or a change of the agent.
type command struct {
	change string // "" for a reading
	ticket any    // int, int64 or string; nil where a change has none
	sensor string
	args   []string
	from   string // who asks: they take turns
}

func (c command) equal(d command) bool {
	return c.ticket == d.ticket && c.sameWork(d)
}

// sameWork reports whether two commands ask the same, perhaps under two tickets.
func (c command) sameWork(d command) bool {
	return c.change == d.change && c.sensor == d.sensor && slices.Equal(c.args, d.args)
}

// A queue runs commands in the order they came, in turn for those who ask, and
// hands in one reading for each that has a ticket. Readings and changes have a
// lane each, so that an update over a bad link does not hold up what is measured.
// Nobody can keep others out by filling it: who has less than a quarter of it
// waiting finds room up to twice its size.
type queue struct {
	run     func(context.Context, command) reading
	deliver func(ticket any, r reading)
	discard func(ticket any) // the undelivered reading, if there is one
	size    int              // of waiting, in each lane

	ctx    context.Context // of what runs
	cancel context.CancelFunc
	done   sync.WaitGroup // what runs

	mu       sync.Mutex // guards what is below
	readings lane
	changes  lane
	active   map[any]*command // waiting or running, by ticket
	closed   bool
	outside  []*applicant // those for whom there was no room, oldest first
}

// An applicant waits for room in the queue.
type applicant struct {
	c     *command
	taken chan error
}

// A lane is a part of the queue.
type lane struct {
	limit   int // of running
	running []*command
	waiting []*command     // oldest first
	has     map[string]int // how many wait, of who asked
	served  []string       // those whose commands began, the latest last, each once
}

func (l *lane) wait(c *command) {
	l.waiting = append(l.waiting, c)
	l.has[c.from]++
}

// leave notes that a command waits no more.
func (l *lane) leave(c *command) {
	if l.has[c.from]--; l.has[c.from] == 0 {
		delete(l.has, c.from)
	}
}

// next takes the command whose turn it is from those that wait: the oldest of
// who was served longest ago.
func (l *lane) next() *command {
	best, rank := -1, 0
	seen := make(map[string]bool)
	for i, c := range l.waiting {
		if seen[c.from] {
			continue
		}
		seen[c.from] = true
		if r := slices.Index(l.served, c.from); best < 0 || r < rank {
			best, rank = i, r
		}
		if len(seen) == len(l.has) {
			break
		}
	}
	if best < 0 {
		return nil
	}
	c := l.waiting[best]
	l.waiting = slices.Delete(l.waiting, best, best+1)
	l.leave(c)
	return c
}

// serve notes whose command begins.
func (l *lane) serve(from string) {
	const most = 64 // a longer memory is not worth its room
	l.served = append(slices.DeleteFunc(l.served, func(s string) bool { return s == from }), from)
	if len(l.served) > most {
		l.served = slices.Delete(l.served, 0, 1)
	}
}

// newQueue returns a queue in which so many readings run at once, and one change.
func newQueue(concurrency, size int, run func(context.Context, command) reading, deliver func(any, reading), discard func(any)) *queue {
	ctx, cancel := context.WithCancel(context.Background())
	return &queue{
		run: run, deliver: deliver, discard: discard, size: size, ctx: ctx, cancel: cancel,
		readings: lane{limit: concurrency, has: make(map[string]int)}, changes: lane{limit: 1, has: make(map[string]int)},
		active: make(map[any]*command),
	}
}

// resize changes how many readings run at once and how many commands wait.
func (q *queue) resize(concurrency, size int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.readings.limit, q.size = concurrency, size
	for len(q.readings.running) < q.readings.limit {
		c := q.readings.next()
		if c == nil {
			break
		}
		q.start(&q.readings, c)
	}
	q.letIn()
}

// count is how many commands wait.
func (q *queue) count() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.readings.waiting) + len(q.changes.waiting)
}

func (q *queue) lane(c *command) *lane {
	if c.change == "" {
		return &q.readings
	}
	return &q.changes
}

// accept takes a command on, waiting for room until the deadline or the end of
// ctx, first come, first served. A command equal to one that waits or runs is
// that one. Any other with a ticket that is known takes its place: the monitor
// has given the ticket away again, and no reading is delivered for the command
// before.
func (q *queue) accept(ctx context.Context, c command, deadline time.Time) error {
	q.mu.Lock()
	taken, err := q.take(&c)
	if taken || err != nil {
		q.mu.Unlock()
		return err
	}
	a := &applicant{&c, make(chan error, 1)}
	q.outside = append(q.outside, a)
	q.mu.Unlock()
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	select {
	case err := <-a.taken:
		return err
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := slices.Index(q.outside, a); i >= 0 {
		q.outside = slices.Delete(q.outside, i, i+1)
		return faultf(faultBusy, "the queue of %d commands is full", q.size)
	}
	return <-a.taken
}

// letIn takes on those who wait outside, as far as there is room.
func (q *queue) letIn() {
	q.outside = slices.DeleteFunc(q.outside, func(a *applicant) bool {
		taken, err := q.take(a.c)
		if taken || err != nil {
			a.taken <- err
		}
		return taken || err != nil
	})
}

// take takes a command on if there is room for it.
func (q *queue) take(c *command) (taken bool, err error) {
	l, known := q.lane(c), q.known(c)
	switch {
	case q.closed:
		return false, faultf(faultBusy, "the agent is shutting down")
	case known != nil && known.equal(*c):
		return true, nil
	case l == &q.readings && slices.Contains(l.waiting, known):
		l.leave(known)
		l.has[c.from]++
		*known = *c // nobody wants the other reading
		c = known
	case len(l.running) < l.limit:
		q.start(l, c)
	case len(l.waiting) < q.size, len(l.waiting) < 2*q.size && l.has[c.from] < max(1, q.size/4):
		l.wait(c)
	default:
		return false, nil
	}
	if c.ticket != nil {
		q.active[c.ticket] = c
		q.discard(c.ticket)
	}
	return true, nil
}

// start runs a command, and those after it.
func (q *queue) start(l *lane, c *command) {
	l.running = append(l.running, c)
	l.serve(c.from)
	q.done.Add(1)
	go q.work(c)
}

// known returns the command that waits or runs with the same ticket; of a
// change without a ticket, one that is the same.
func (q *queue) known(c *command) *command {
	if c.ticket != nil {
		return q.active[c.ticket]
	}
	for _, other := range append(slices.Clone(q.changes.running), q.changes.waiting...) {
		if other.equal(*c) {
			return other
		}
	}
	return nil
}

// work runs commands of a lane until none waits.
func (q *queue) work(c *command) {
	defer q.done.Done()
	for c != nil {
		c = q.finish(c, q.run(q.ctx, *c))
	}
}

// finish hands in the reading of a command, and returns the next to run. Who
// waits for the same change joins: it is made once.
func (q *queue) finish(c *command, r reading) *command {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.hand(c, r)
	l := q.lane(c)
	l.running = slices.DeleteFunc(l.running, func(other *command) bool { return other == c })
	if l == &q.changes {
		join := true // up to one that asks something else of the same sensor
		l.waiting = slices.DeleteFunc(l.waiting, func(other *command) bool {
			if join = join && (other.sensor != c.sensor || other.sameWork(*c)); join && other.sameWork(*c) {
				q.hand(other, r)
				l.leave(other)
				return true
			}
			return false
		})
	}
	var next *command
	if len(l.running) < l.limit {
		next = l.next()
	}
	if next != nil {
		l.running = append(l.running, next)
		l.serve(next.from)
	}
	q.letIn()
	return next
}

// hand hands in a reading, unless there is no ticket, or it was given away again.
func (q *queue) hand(c *command, r reading) {
	if c.ticket == nil || q.active[c.ticket] != c {
		return
	}
	delete(q.active, c.ticket)
	q.deliver(c.ticket, r)
}

// close takes no more commands. Those that wait get the reading of a run that
// SIGTERM ended; those that run have until ctx ends. When close returns, nothing
// runs and every reading has been handed in.
func (q *queue) close(ctx context.Context) {
	q.mu.Lock()
	q.closed = true
	for _, l := range []*lane{&q.readings, &q.changes} {
		for _, c := range l.waiting {
			q.hand(c, reading{code: -int(syscall.SIGTERM), taken: time.Now(), reason: "the agent ends"})
		}
		l.waiting, l.has = nil, make(map[string]int)
	}
	q.letIn() // which tells them
	q.mu.Unlock()
	stop := context.AfterFunc(ctx, q.cancel)
	defer stop()
	q.done.Wait()
	q.cancel()
}
