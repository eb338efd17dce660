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
	"bufio"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log"
	"math/rand"
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
	"unsafe"
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
	maxPending  = 1024            // readings that wait for the monitor in memory alone
	roomForRuns = 64              // of them, kept free for the runs that go on when no more may begin
	maxBackoff  = 5 * time.Minute // between two attempts to reach a monitor that is away
	maxTries    = 3               // faults after which a reading is dropped
	faultFactor = 10              // times the backoff of a monitor that is away: a locked database takes its time
	lastTime    = time.Second     // for each attempt when the agent ends
	lastMisses  = 4               // attempts in a row that may fail then
	spoolRetry  = time.Minute     // before a spool that could not be written is tried again
	spoolTime   = 5 * time.Second // for the last write to the spool when the agent ends
)

// A reading is the outcome of one run of a sensor.
type reading struct {
	code   int       // 0, or why there is no number
	value  string    // the sensor's own digits; "" where there is no number
	taken  time.Time // when the run ended
	reason string    // for the log, where the code is not 0; never sent
}

// A pendingReading is a reading that the monitor does not have yet.
type pendingReading struct {
	reading
	ticket    any       // int, int64 or string, as the monitor sent it
	takenAt   clocks    // when the run ended, by all clocks of the box
	misses    int       // attempts that the monitor did not answer
	failures  int       // of them, those right after an answer: the monitor fails on this reading
	faults    int       // attempts that it answered with a fault
	notBefore time.Time // of the next attempt
	record    uint64    // its number in the spool; 0: it does not belong there
	size      int       // bytes of its record
	onDisk    bool      // the record is written
	done      bool      // it is pending no more
}

// A delivery hands readings in at the monitor with cmd_store_probe_data, one at
// a time: old monitors serve one connection after the other. One rule chooses
// the next reading: the one tried least often, in turn from the oldest and from
// the newest end. So neither a backlog nor a reading on which the monitor always
// fails holds up the others.
//
// A reading leaves the delivery when the monitor has taken it, has answered it
// with three faults or has given its ticket away again. The oldest is dropped
// when there is no more room: for 1,024 readings in memory, and for what the spool
// may hold. While the monitor is away, one attempt is made after 1, 2, 4 …
// seconds, at most 5 minutes, ±50 %, however many readings wait.
//
// With a spool, a reading that the monitor did not take at the first attempt is
// on the disk as soon as the disk allows, and so is every other one while the
// monitor is away or the agent ends. A goroutine of its own writes the spool: a
// disk that hangs holds up neither sensors nor the delivery.
type delivery struct {
	retry   time.Duration // the first backoff
	clocks  func() clocks
	cancel  context.CancelFunc // ends the attempt that is under way
	sent    chan struct{}      // closed when the sender has ended
	saved   chan struct{}      // closed when the spool is written no more
	dropped logLimit
	spool   *spool // nil: there is none; else what is in it belongs to the goroutine that writes it

	mu           cond // guards what is below, and is broadcast at each change
	client       *client
	zone         *time.Location
	noValue      string            // sent where there is no number
	pending      []*pendingReading // oldest first
	inMemory     int               // of pending, those that are not on the disk
	fromNewest   bool              // the next reading is looked for from the newest end
	awaySince    time.Time         // zero while the monitor is there
	misses       int               // attempts without an answer since the latest answer
	retryAt      time.Time         // no attempt before that
	waitingSince time.Time         // since when runs have waited and the monitor has taken nothing
	ending       bool              // there is no limit any more, and everything is saved
	closing      bool              // the sender is to end
	sealed       bool              // what is to be written to the spool now is the last
	totals       deliveryTotals

	records      []byte       // to be added to the spool
	syncRecords  bool         // they must survive a power cut
	lastRecord   uint64       // the highest number of a record
	held         int          // bytes of the records of pending readings
	needsRewrite bool         // the file is to be written anew
	reused       map[any]bool // tickets given away again before the spool was read; then nil
}

// deliveryTotals counts readings since the start of the agent.
type deliveryTotals struct {
	delivered, dropped int
	latest             time.Time // the latest delivery; zero before the first
	spoolBytes         int64     // at present
}

// newDelivery returns a delivery that works until close. What the spool holds
// (nil: there is none) joins its readings as soon as it is read. The second
// attempt to reach a monitor comes about the time retry after the first.
func newDelivery(c *client, zone *time.Location, noValue string, retry time.Duration, s *spool) *delivery {
	ctx, cancel := context.WithCancel(context.Background())
	d := &delivery{
		retry: retry, clocks: systemClocks(), cancel: cancel, sent: make(chan struct{}), saved: make(chan struct{}),
		dropped: logLimit{burst: 20, perSecond: 0.2}, spool: s,
		client: c, zone: zone, noValue: noValue, needsRewrite: true,
	}
	if s != nil {
		d.reused = make(map[any]bool)
	}
	go func() {
		defer close(d.sent)
		for p, c := d.next(ctx); p != nil; p, c = d.next(ctx) {
			d.record(ctx, p, c, d.send(ctx, p, c))
		}
	}()
	go func() {
		defer close(d.saved)
		if s != nil {
			d.writeSpool()
		}
	}()
	return d
}

// configure applies new settings to all further attempts, and retries at once.
// What another monitor did with a reading does not count.
func (d *delivery) configure(c *client, zone *time.Location, noValue string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	moved := d.client.url.String() != c.url.String()
	if moved {
		d.awaySince = time.Time{}
	}
	d.misses, d.retryAt = 0, time.Time{}
	for _, p := range d.pending {
		p.notBefore = time.Time{}
		if moved {
			p.misses, p.failures, p.faults = 0, 0, 0
		}
	}
	d.client.close()
	d.client, d.zone, d.noValue = c, zone, noValue
	d.mu.broadcast()
}

// monitor returns the client of the monitor that readings go to.
func (d *delivery) monitor() *client {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.client
}

// count returns how many readings are pending, and what became of the others.
func (d *delivery) count() (undelivered int, t deliveryTotals) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.pending), d.totals
}

// put takes a reading to deliver. It never blocks.
func (d *delivery) put(ticket any, r reading) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.inMemory >= maxPending && !d.ending {
		d.dropOldest(func(p *pendingReading) bool { return !p.onDisk }, fmt.Sprintf("more than %d undelivered", maxPending))
	}
	now, since := d.clocks(), time.Since(r.taken)
	p := &pendingReading{reading: r, ticket: ticket, takenAt: clocks{now.wall.Add(-since), now.age - since, now.boot}}
	d.pending = append(d.pending, p)
	d.inMemory++
	if d.ending || !d.awaySince.IsZero() {
		d.save(p)
	}
	d.mu.broadcast()
}

// dropOldest drops the oldest reading for which may returns true. It reports
// whether there was one.
func (d *delivery) dropOldest(may func(*pendingReading) bool, of string) bool {
	i := slices.IndexFunc(d.pending, may)
	if i >= 0 {
		d.drop(d.pending[i], "the oldest of "+of)
	}
	return i >= 0
}

// drop gives a reading up and logs why.
func (d *delivery) drop(p *pendingReading, why string) {
	d.remove(p)
	d.totals.dropped++
	d.dropped.printf(warning+"%s: reading dropped: %s", ticketText(p.ticket), why)
}

// remove ends the life of a reading that is delivered, dropped or discarded, in
// the spool as well.
func (d *delivery) remove(p *pendingReading) {
	if p.done {
		return
	}
	p.done = true
	if d.pending[0] == p { // as a backlog of thousands leaves
		d.pending[0] = nil
		d.pending = d.pending[1:]
	} else {
		i := slices.Index(d.pending, p)
		d.pending = slices.Delete(d.pending, i, i+1)
	}
	if !p.onDisk {
		d.inMemory--
	}
	if p.record != 0 {
		d.held -= p.size
		d.addRecord(markRecord(p.record), false)
	}
}

// discard forgets the pending readings of a ticket that the monitor has given
// away again.
func (d *delivery) discard(ticket any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.reused != nil && len(d.reused) < maxPending {
		d.reused[ticket] = true
	}
	for i := len(d.pending) - 1; i >= 0; i-- {
		if d.pending[i].ticket == ticket {
			d.remove(d.pending[i])
			d.syncRecords = true // it must not come back
			d.dropped.printf("%s: reading discarded: the ticket was given away again", ticketText(ticket))
		}
	}
	d.mu.broadcast()
}

// full reports whether runs have to wait: the monitor is there, but slower than
// the sensors. While it is away nobody waits for it.
func (d *delivery) full() bool {
	return d.inMemory >= maxPending-roomForRuns && d.awaySince.IsZero() && !d.ending
}

// waitRoom waits until a run may begin or ctx ends. So a monitor that is slower
// than the sensors makes its dispatcher wait, and nothing is dropped.
func (d *delivery) waitRoom(ctx context.Context) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.full() && ctx.Err() == nil {
		if d.waitingSince.IsZero() {
			d.waitingSince = time.Now()
		}
		d.mu.wait(ctx)
	}
	if !d.full() {
		d.waitingSince = time.Time{}
	}
}

// stalledSince returns since when runs have waited for room and the monitor has
// taken no reading. It returns zero where no run has to wait.
func (d *delivery) stalledSince() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.full() {
		return time.Time{}
	}
	return d.waitingSince
}

// next waits for a reading that may be tried, and returns it with the client to
// send it with. It returns nil when the delivery closes.
func (d *delivery) next(ctx context.Context) (*pendingReading, *client) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for !d.closing {
		p, at := d.choose(time.Now())
		if p != nil {
			d.fromNewest = !d.fromNewest
			return p, d.client
		}
		d.waitUntil(ctx, at)
	}
	return nil, nil
}

// choose returns the reading to try now, or when there may be one (zero: after
// the next change).
func (d *delivery) choose(now time.Time) (best *pendingReading, at time.Time) {
	if now.Before(d.retryAt) {
		return nil, d.retryAt
	}
	for i := range d.pending {
		p := d.pending[i]
		if d.fromNewest {
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

// waitUntil waits for a change, or until at where that is not zero.
func (d *delivery) waitUntil(ctx context.Context, at time.Time) {
	if !at.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, at)
		defer cancel()
	}
	d.mu.wait(ctx)
}

// send makes one attempt to deliver a reading.
func (d *delivery) send(ctx context.Context, p *pendingReading, c *client) error {
	d.mu.Lock()
	zone, value := d.zone, p.value
	if value == "" {
		value = d.noValue
	}
	d.mu.Unlock()
	taken := p.takenAt.corrected(d.clocks()).In(zone)
	_, err := c.call(ctx, "cmd_store_probe_data", p.ticket, []any{p.code, value}, dateTime(taken.Format(dateTimeLayout)))
	return err
}

// record notes how an attempt ended. When ctx has ended, an error is the
// agent's doing and says nothing of the monitor.
func (d *delivery) record(ctx context.Context, p *pendingReading, c *client, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var f *fault
	switch now := time.Now(); {
	case err == nil:
		d.remove(p)
		d.totals.delivered++
		d.totals.latest, d.waitingSince = now, time.Time{}
		d.answered(now)
	case c != d.client: // it was not the monitor any more
	case ctx.Err() != nil:
		p.misses++ // so that others are tried before it
	case errors.As(err, &f):
		p.faults++
		p.notBefore = now.Add(backoff(faultFactor*d.retry, p.faults))
		if p.faults == maxTries && !p.done {
			d.drop(p, fmt.Sprintf("monitor %s: %v", c.url.Redacted(), err))
		}
		d.answered(now)
	default:
		d.missed(p, now, err)
	}
	d.save(p)
	d.mu.broadcast()
}

// answered notes that the monitor is there.
func (d *delivery) answered(now time.Time) {
	if !d.awaySince.IsZero() {
		away := now.Sub(d.awaySince).Round(time.Second)
		log.Printf(notice+"monitor %s: back after %s, %d to deliver", d.client.url.Redacted(), away, len(d.pending))
	}
	d.awaySince, d.misses, d.retryAt = time.Time{}, 0, time.Time{}
}

// missed notes an attempt that got no answer.
func (d *delivery) missed(p *pendingReading, now time.Time, err error) {
	if d.awaySince.IsZero() {
		d.awaySince = now
		log.Printf(warning+"monitor %s: away: %s", d.client.url.Redacted(), oneLine(err.Error()))
		d.saveAll()
	}
	d.misses++
	p.misses++
	d.retryAt = now.Add(backoff(d.retry, d.misses))
	if d.misses == 1 {
		p.failures++
		p.notBefore = now.Add(backoff(d.retry, p.failures))
	}
}

// backoff returns how long to wait after n failures in a row: first, doubled
// with each of them up to 5 minutes. Of that it is 50 to 150 %, by chance, so
// that a thousand boxes do not all call when their monitor is back.
func backoff(first time.Duration, n int) time.Duration {
	d := maxBackoff
	if n <= 20 {
		d = min(first<<(n-1), maxBackoff)
	}
	return d/2 + time.Duration(rand.Int63n(int64(d)+1))
}

// putLast prepares the end of the agent: put drops nothing any more, as the
// readings of commands that waited must not push out what was measured. All go to
// the spool at once, as an init may not wait for long.
func (d *delivery) putLast() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ending = true
	d.saveAll()
	d.mu.broadcast()
}

// close tries each pending reading once more, as long as ctx and the monitor
// allow, and ends the delivery. What is left is logged, and in the spool if there
// is one. A disk that hangs holds up the end by five seconds at most.
func (d *delivery) close(ctx context.Context) {
	d.putLast()
	d.mu.Lock()
	d.closing = true
	d.mu.broadcast()
	d.mu.Unlock()
	attempt, cancel := context.WithTimeout(ctx, lastTime) // the one under way may have been so for long
	context.AfterFunc(attempt, d.cancel)
	<-d.sent
	cancel()
	d.sendLast(ctx)
	d.mu.Lock()
	d.sealed = true
	d.mu.broadcast()
	d.mu.Unlock()
	select {
	case <-d.saved:
	case <-time.After(spoolTime):
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.client.close()
	if n := len(d.pending); n > 0 {
		log.Printf(warning+"monitor %s: %s not delivered, %d of them in the spool", d.client.url.Redacted(),
			plural(n, "reading"), n-d.inMemory)
	}
}

// sendLast tries what is pending, the readings tried least often first. Each
// attempt has a second; after four in a row without an answer it gives up.
func (d *delivery) sendLast(ctx context.Context) {
	d.mu.Lock()
	defer d.mu.Unlock()
	left := slices.Clone(d.pending)
	slices.SortStableFunc(left, func(a, b *pendingReading) int { return a.misses - b.misses })
	d.misses = 0
	for _, p := range left {
		if p.done {
			continue
		}
		if d.misses == lastMisses || ctx.Err() != nil {
			return
		}
		c := d.client
		d.mu.Unlock()
		attempt, cancel := context.WithTimeout(ctx, lastTime)
		err := d.send(attempt, p, c)
		cancel()
		d.record(ctx, p, c, err)
		d.mu.Lock()
	}
}

// save puts a reading into the spool, if there is one. Where that is more than it
// may hold, the oldest go: a quarter of the file is left for marks, so that it need
// not be written anew for each reading.
func (d *delivery) save(p *pendingReading) {
	if d.spool == nil || p.record != 0 || p.done {
		return
	}
	d.lastRecord++
	p.record = d.lastRecord
	record := readingRecord(p, d.clocks())
	p.size = len(record)
	d.held += p.size
	d.addRecord(record, true)
	d.fitSpool()
}

func (d *delivery) fitSpool() {
	inSpool := func(p *pendingReading) bool { return p.record != 0 }
	for d.held > d.spool.limit/4*3 && d.dropOldest(inSpool, "what the spool holds") {
	}
}

func (d *delivery) saveAll() {
	for _, p := range slices.Clone(d.pending) { // save may drop some
		d.save(p)
	}
}

// addRecord adds a record to those that are to be written, unless the file is to
// be written anew. So it is where too many come, as while the disk hangs.
func (d *delivery) addRecord(record string, sync bool) {
	if d.needsRewrite {
		return
	}
	d.records = append(d.records, record...)
	d.syncRecords = d.syncRecords || sync
	if len(d.records) > d.spool.limit {
		d.records, d.needsRewrite = nil, true
	}
}

// writeSpool writes to the spool until the delivery is sealed. After an error
// the whole file is written anew, a minute later.
func (d *delivery) writeSpool() {
	s := d.spool
	defer s.close()
	for last := false; !last; {
		last = d.awaitSpoolWork()
		found, opened, err := s.open()
		if opened {
			d.adopt(found)
		}
		if err == nil {
			err = d.flushSpool()
		}
		d.mu.Lock()
		d.totals.spoolBytes = int64(s.size)
		switch failed := !s.retryAt.IsZero(); {
		case err != nil:
			if !failed {
				log.Printf(severe+"spool %s: %v; undelivered readings are in memory alone", s.file(), err)
			}
			s.retryAt, d.needsRewrite = time.Now().Add(spoolRetry), true
		case failed:
			log.Printf(notice+"spool %s: works again", s.file())
			s.retryAt = time.Time{}
		}
		d.mu.Unlock()
	}
}

// awaitSpoolWork waits until there is something to write and the spool may be
// tried. It reports whether it is for the last time.
func (d *delivery) awaitSpoolWork() (last bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for !d.sealed {
		var at time.Time
		if d.held > 0 && d.spool.written.stepped(d.clocks()) {
			d.needsRewrite = true // the times in the file are wrong
		}
		if len(d.records) > 0 || d.needsRewrite {
			if at = d.spool.retryAt; !time.Now().Before(at) {
				return false
			}
		}
		d.waitUntil(context.Background(), at)
	}
	return true
}

// flushSpool writes what is to be written now. A file that would become too
// large is written anew.
func (d *delivery) flushSpool() error {
	s, now := d.spool, d.clocks()
	d.mu.Lock()
	records, sync, last := d.records, d.syncRecords, d.lastRecord
	size := s.size + len(records)
	rewrite := d.needsRewrite || size > s.limit || d.held == 0 && size > 0
	d.records, d.syncRecords, d.needsRewrite = nil, false, false
	var all []*pendingReading
	if rewrite {
		all = slices.DeleteFunc(slices.Clone(d.pending), func(p *pendingReading) bool { return p.record == 0 })
	}
	d.mu.Unlock()
	if rewrite {
		if err := s.rewrite(all, now); err != nil {
			return err
		}
	} else if err := s.append(records, sync); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s.written = now
	for i := 0; i < len(d.pending) && (rewrite || sync); i++ { // else there were only marks
		p := d.pending[i]
		if !p.onDisk && p.record != 0 && p.record <= last {
			p.onDisk = true
			d.inMemory--
		}
	}
	d.mu.broadcast()
	return nil
}

// adopt puts what a file was found to hold in front of the other readings. Of
// a ticket only the newest reading counts, and none where the ticket was given
// away again since. What was in another file before belongs in this one.
func (d *delivery) adopt(found []*pendingReading) {
	d.mu.Lock()
	defer d.mu.Unlock()
	newest := make(map[any]*pendingReading)
	for _, p := range found {
		newest[p.ticket] = p
	}
	for _, p := range d.pending {
		delete(newest, p.ticket)
		p.onDisk = false
	}
	adopted := slices.DeleteFunc(found, func(p *pendingReading) bool {
		return newest[p.ticket] != p || d.reused[p.ticket]
	})
	s, now := d.spool, d.clocks()
	d.needsRewrite = s.damaged > 0 || len(adopted) < len(found) || d.lastRecord > 0
	for _, p := range adopted {
		p.record += d.lastRecord
		d.held += p.size
		d.needsRewrite = d.needsRewrite || p.takenAt.stepped(now)
	}
	d.lastRecord += s.last
	d.inMemory = len(d.pending)
	d.pending, d.reused = append(adopted, d.pending...), nil
	if len(adopted) > 0 {
		log.Printf(notice+"spool %s: %s to deliver from the time before", s.file(), plural(len(adopted), "reading"))
		d.addRecord("\n", false) // the last line may have no end
	}
	d.fitSpool()
	d.mu.broadcast()
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
// Records of type c, which older agents wrote, are passed over. A torn or damaged
// line costs itself alone.
//
// A write with new readings is synced once; marks are not, so that some readings
// may be delivered again after a power cut. The file is empty when nothing in it
// is pending.
//
// What another user of the box puts in the way, in the directory or on the path
// to it, makes the spool fail; nothing elsewhere is read or written.
//
// A spool belongs to one goroutine.
type spool struct {
	dir     string
	limit   int       // bytes of the file
	folder  *os.File  // the directory
	f       *os.File  // the file; nil: not open
	size    int       // bytes of the file
	last    uint64    // the highest number that was found
	damaged int       // lines that were found
	written clocks    // when the file was written
	retryAt time.Time // after an error; zero while the spool works
}

func newSpool(dir string, limit int64) *spool { return &spool{dir: dir, limit: int(limit)} }

const (
	spoolFile = "readings"
	spoolNext = "readings.next" // becomes the file when that is written anew
	maxRecord = 16 << 10        // bytes of a line: a ticket of 1 KiB, quoted, and a value of 4 KiB
)

func (s *spool) file() string { return filepath.Join(s.dir, spoolFile) }

// open opens the file, which stays locked, unless it is open and still the one
// of that name. It reports whether it did, and returns what the file holds.
func (s *spool) open() (found []*pendingReading, opened bool, err error) {
	if s.f != nil && s.isCurrent() {
		return nil, false, nil
	}
	s.close()
	if s.folder, err = openFolder(s.dir); err != nil {
		return nil, false, err
	}
	s.f, err = openIn(s.folder, spoolFile, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW)
	if err == nil {
		err = s.claim()
	}
	if err == nil {
		found, err = s.read(s.f)
	}
	if err != nil {
		s.close()
		return nil, false, err
	}
	if s.damaged > 0 {
		log.Printf(warning+"spool %s: %s passed over", s.file(), plural(s.damaged, "damaged record"))
	}
	return found, true, nil
}

// claim locks the file that was opened, and makes sure that it is the agent's.
func (s *spool) claim() error {
	info, err := s.f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Sys().(*syscall.Stat_t).Nlink != 1 {
		return errors.New("not a plain file with one name: who put it there?")
	}
	err = syscall.Flock(int(s.f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) // of other errors: a file system without locks
	if errors.Is(err, syscall.EWOULDBLOCK) || !s.isCurrent() {
		return errors.New("another process uses it")
	}
	if err := s.f.Chmod(0o600); err != nil {
		return err
	}
	return syncFolder(s.folder) // the file may be new
}

func (s *spool) close() {
	s.f.Close() // which of nil does nothing
	s.folder.Close()
	s.f, s.folder = nil, nil
}

// isCurrent reports whether the open file is the one that the path names:
// somebody may have removed it, or mounted a disk over it.
func (s *spool) isCurrent() bool {
	named, err := os.Lstat(s.file())
	opened, err2 := s.f.Stat()
	return err == nil && err2 == nil && os.SameFile(named, opened)
}

// append adds records at the end of the file.
func (s *spool) append(records []byte, sync bool) error {
	if _, err := s.f.WriteAt(records, int64(s.size)); err != nil {
		return err
	}
	s.size += len(records)
	if !sync {
		return nil
	}
	return s.f.Sync()
}

// rewrite makes a file of these readings alone. At every moment the old file or
// the new one is there, whole.
func (s *spool) rewrite(all []*pendingReading, now clocks) error {
	if len(all) == 0 { // which takes no space on the disk
		if err := s.f.Truncate(0); err != nil {
			return err
		}
		s.size = 0
		return s.f.Sync()
	}
	dir := int(s.folder.Fd())
	syscall.Unlinkat(dir, spoolNext) // of a power cut
	f, err := openIn(s.folder, spoolNext, os.O_WRONLY|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) // nobody else knows it yet
	out, size := bufio.NewWriter(f), 0
	for _, p := range all {
		n, _ := out.WriteString(readingRecord(p, now)) // Flush returns the error
		size += n
	}
	if err = out.Flush(); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = syscall.Renameat(dir, spoolNext, dir, spoolFile)
	}
	if err != nil {
		f.Close()
		syscall.Unlinkat(dir, spoolNext)
		return err
	}
	s.f.Close()
	s.f, s.size = f, size
	return syncFolder(s.folder)
}

// openFolder opens a directory and makes what is missing of its path. A link
// on it is followed only where nobody but the agent and root can have made it.
func openFolder(path string) (*os.File, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	const oPath = 0x200000 // a directory need not be readable; Linux before 2.6.39 ignores it
	dir, err := os.Open("/")
	for _, name := range strings.Split(path, "/")[1:] {
		if err != nil {
			return nil, err
		}
		above, flags := dir, oPath|syscall.O_DIRECTORY
		if !isPrivate(above) {
			flags |= syscall.O_NOFOLLOW
		}
		if dir, err = openIn(above, name, flags); errors.Is(err, syscall.ENOENT) {
			if err = syscall.Mkdirat(int(above.Fd()), name, 0o700); err == nil {
				syncFolder(above) // which whoever may write there need not be able to
				dir, err = openIn(above, name, flags)
			}
		}
		above.Close()
	}
	return dir, err
}

// syncFolder syncs an open directory, as far as its file system can.
func syncFolder(dir *os.File) error {
	f, err := openIn(dir, ".", os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return err
	}
	return nil
}

// isPrivate reports whether only the agent and root can write to a directory.
func isPrivate(dir *os.File) bool {
	info, err := dir.Stat()
	if err != nil || info.Mode()&0o022 != 0 {
		return false
	}
	owner := int(info.Sys().(*syscall.Stat_t).Uid)
	return owner == 0 || owner == os.Geteuid()
}

// openIn opens a file in an open directory. It waits for no pipe.
func openIn(dir *os.File, name string, flags int) (*os.File, error) {
	path := filepath.Join(dir.Name(), name)
	fd, err := syscall.Openat(int(dir.Fd()), name, flags|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0o600)
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENOTDIR) {
		err = fmt.Errorf("%w (and a link that somebody else may have made is not followed)", err)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// read reads the records of a spool and returns the readings that are not marked.
func (s *spool) read(r io.Reader) (found []*pendingReading, err error) {
	s.size, s.last, s.damaged = 0, 0, 0
	done := make(map[uint64]bool)
	lines := bufio.NewReaderSize(r, maxRecord)
	for err == nil {
		var line []byte
		line, err = lines.ReadSlice('\n')
		s.size += len(line)
		for errors.Is(err, bufio.ErrBufferFull) {
			line, err = lines.ReadSlice('\n')
			s.size += len(line)
			line = []byte("longer than any record")
		}
		if len(line) == 0 || line[0] == '\n' {
			continue
		}
		p, ok := parseRecord(strings.TrimSuffix(string(line), "\n"))
		p.size = len(line)
		switch {
		case !ok:
			s.damaged++
		case p.done:
			done[p.record] = true
		default:
			found = append(found, p)
		}
		s.last = max(s.last, p.record)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return slices.DeleteFunc(found, func(p *pendingReading) bool { return done[p.record] }), err
}

// parseRecord parses a line of a spool, without its end, and reports whether it
// is a record. A mark comes back as a reading that is done.
func parseRecord(line string) (p *pendingReading, ok bool) {
	p = &pendingReading{onDisk: true}
	sum, text, _ := strings.Cut(line, " ")
	if sum != checksum(text) {
		return p, false
	}
	if n, _ := fmt.Sscanf(text, "d %d", &p.record); n == 1 || strings.HasPrefix(text, "c ") {
		p.done = true
		return p, true
	}
	words := strings.SplitN(text, " ", 9) // r number boot age clock code value type ticket
	var age, wall int64
	n, _ := fmt.Sscanf(text, "r %d %s %d %d %d %s", &p.record, &p.takenAt.boot, &age, &wall, &p.code, &p.value)
	if n < 6 || len(words) < 9 || p.record == 0 {
		return p, false
	}
	p.takenAt.age, p.takenAt.wall = time.Duration(age)*time.Millisecond, time.UnixMilli(wall)
	var err, err2 error
	if p.value == "-" {
		p.value = ""
	} else {
		_, err = parseDecimal(p.value)
	}
	p.ticket, err2 = parseTicket(words[7], words[8])
	return p, err == nil && err2 == nil
}

// readingRecord returns the record of a reading, with its time corrected.
func readingRecord(p *pendingReading, now clocks) string {
	at, value := p.takenAt, p.value
	if value == "" {
		value = "-"
	}
	wall := at.corrected(now).UnixMilli()
	return withChecksum(fmt.Sprintf("r %d %s %d %d %d %s %s",
		p.record, at.boot, at.age.Milliseconds(), wall, p.code, value, wireTicket(p.ticket)))
}

func markRecord(number uint64) string { return withChecksum(fmt.Sprintf("d %d", number)) }

func withChecksum(text string) string { return checksum(text) + " " + text + "\n" }

func checksum(text string) string { return fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(text))) }

// wireTicket returns a ticket as a record has it: its type and what it is.
func wireTicket(ticket any) string {
	switch t := ticket.(type) {
	case int64:
		return fmt.Sprintf("i8 %d", t)
	case string:
		return "string " + strconv.QuoteToASCII(t)
	}
	return fmt.Sprint("int ", ticket)
}

// parseTicket is the reverse of wireTicket.
func parseTicket(kind, text string) (any, error) {
	switch kind {
	case "int":
		n, err := strconv.ParseInt(text, 10, 32)
		return int(n), err
	case "i8":
		return strconv.ParseInt(text, 10, 64)
	case "string":
		return strconv.Unquote(text)
	}
	return nil, fmt.Errorf("a ticket of the type %q", kind)
}

// ticketText returns a ticket for the log.
func ticketText(ticket any) string {
	switch t := ticket.(type) {
	case nil:
		return "no ticket"
	case string:
		return "ticket " + cut(t)
	}
	return fmt.Sprint("ticket ", ticket)
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

// corrected returns what a clock that is right now would have shown at c: what it
// shows now, less the time that passed. A box without a battery clock boots in
// 1970. Of another boot nothing is known, and c.wall counts.
func (c clocks) corrected(now clocks) time.Time {
	t := now.wall.Add(c.age - now.age)
	if c.boot != now.boot || c.age > now.age || t.Sub(c.wall).Abs() < clockStep {
		return c.wall
	}
	return t
}

// stepped reports whether the clock was set between c and now.
func (c clocks) stepped(now clocks) bool { return c.corrected(now) != c.wall }

// systemClocks returns a function that reads the clocks of the box. Where it
// names no boot or tells no time since then, each process counts as a boot.
func systemClocks() func() clocks {
	start := time.Now()
	_, known := sinceBoot()
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || len(id) < 8 || !known {
		id = []byte(fmt.Sprintf("%08x", rand.Uint32()))
	}
	boot := string(id[:8])
	return func() clocks {
		now := time.Now()
		age := now.Sub(start)
		if known {
			age, _ = sinceBoot()
		}
		return clocks{now.Round(0), age, boot}
	}
}

// sinceBoot returns the time since boot, in suspend as well, and whether the box
// tells it. Linux before 2.6.39 has it in /proc/uptime alone.
func sinceBoot() (time.Duration, bool) {
	const clockBoottime = 7
	var t syscall.Timespec
	_, _, errno := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clockBoottime, uintptr(unsafe.Pointer(&t)), 0)
	if errno == 0 {
		return time.Duration(t.Nano()), true
	}
	text, err := os.ReadFile("/proc/uptime") // 350735.47 1265389.12
	seconds, _, _ := strings.Cut(string(text), " ")
	age, err2 := time.ParseDuration(seconds + "s")
	return age, err == nil && err2 == nil
}

const maxZone = 64 << 10 // bytes of a zone's file: the largest have 4 KiB

// localZone returns the zone that the box's own date shows: TZ (the name or path
// of a zone's file, or a POSIX string such as CET-1CEST,M3.5.0,M10.5.0/3), else
// /etc/localtime, else the POSIX string in /etc/TZ (OpenWrt), else UTC. What
// can't be read there counts as UTC, as it does for date, and is logged.
func localZone() *time.Location {
	tz, ok := os.LookupEnv("TZ")
	return zoneOf(tz, ok, "/etc")
}

func zoneOf(tz string, ok bool, etc string) *time.Location {
	if !ok {
		if zone, err := zoneFile(filepath.Join(etc, "localtime")); err == nil {
			return zone
		}
		text, err := readSmall(filepath.Join(etc, "TZ"), maxZone)
		if err != nil {
			return time.UTC
		}
		tz = strings.TrimSpace(string(text))
	}
	tz = strings.TrimPrefix(tz, ":")
	load := time.LoadLocation
	if strings.HasPrefix(tz, "/") {
		load = zoneFile
	}
	zone, err := load(tz)
	if err != nil {
		zone, err = posixZone(tz)
	}
	if err != nil {
		log.Printf("time zone: %v; UTC instead", err)
		return time.UTC
	}
	return zone
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
	block := "TZif2" + strings.Repeat("\x00", 15+16) + "\x00\x00\x00\x01\x00\x00\x00\x04" + // one zone, four letters
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
