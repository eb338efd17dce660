package main

// Helpers first, then the tests in the order of the source files, last the
// whole story over HTTP. Tests use loopback and temporary directories only.

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"maps"
	"math"
	"math/big"
	mathrand "math/rand"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

var (
	update   = flag.Bool("update", false, "rewrite the golden files of testdata")
	kills    = flag.Int("kills", 25, "how often TestKill kills the agent")
	soakTime = flag.Duration("soak", 3*time.Second, "how long TestSoak goes on")
)

// patience is how long a test waits for what must happen, before it fails.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv("PICKET_TEST_MAIN") != "" { // a child that is to be the program
		if n, err := strconv.ParseUint(os.Getenv("PICKET_TEST_FILES"), 10, 16); err == nil {
			syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: n, Max: n})
		}
		main()
		os.Exit(0)
	}
	if spec := os.Getenv("PICKET_TEST_CRASH"); spec != "" { // a child that is to die
		crashChild(spec)
		os.Exit(0)
	}
	flag.Parse()
	log.SetFlags(0)
	if !testing.Verbose() {
		log.SetOutput(io.Discard)
	}
	code := m.Run()
	for _, what := range sortedKeys(totals.n) {
		fmt.Printf("total: %d %s\n", totals.n[what], what)
	}
	os.Exit(code)
}

// Totals are what the tests have done, printed at the end so that it can be
// quoted.
var totals struct {
	sync.Mutex
	n map[string]int
}

// total counts what a test has done.
func total(what string, n int) {
	totals.Lock()
	defer totals.Unlock()
	if totals.n == nil {
		totals.n = make(map[string]int)
	}
	totals.n[what] += n
}

// logged returns what is logged from here to the end of the test.
func logged(t *testing.T) fmt.Stringer {
	var b lockedBuffer
	before := log.Writer()
	log.SetOutput(unmarked{&b})
	t.Cleanup(func() { log.SetOutput(before) })
	return &b
}

// Unmarked takes the severities off the lines of a log.
type unmarked struct{ w io.Writer }

func (u unmarked) Write(line []byte) (int, error) {
	_, text := splitSeverity(string(line))
	_, err := io.WriteString(u.w, text)
	return len(line), err
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// await waits until what comes true.
func await(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not in %v", what, patience)
		}
	}
}

// receive waits for the next element of a channel.
func receive[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("%s: nothing in %v", what, patience)
		panic("unreachable")
	}
}

// golden compares got with a file of testdata.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
	}
}

// shipped returns the shipped files whose names begin so, or skips the test where
// one is not as it is shipped: whoever uses picket changes client.cfg and sensors.
// testdata/shipped.txt has their checksums, as of sha256sum; -update renews them.
func shipped(t testing.TB, prefix string) map[string]string {
	t.Helper()
	const list = "testdata/shipped.txt"
	sums, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	files, now := make(map[string]string), ""
	for _, line := range strings.Split(strings.TrimSpace(string(sums)), "\n") {
		_, name, _ := strings.Cut(line, "  ")
		text, _ := os.ReadFile(name) // it may be gone
		is := fmt.Sprintf("%x  %s", sha256.Sum256(text), name)
		now += is + "\n"
		if strings.HasPrefix(name, prefix) {
			files[name] = string(text)
			if is != line && !*update {
				t.Skipf("%s is not as it is shipped; if it is to be shipped so, run go test -update", name)
			}
		}
	}
	if *update {
		if err := os.WriteFile(list, []byte(now), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// A testCase is one of the cases that a file of testdata holds.
type testCase struct{ name, text string }

// cases reads a file of testdata. Each case begins with a line "-- NAME --" and
// goes on to the next such line; what stands before the first is for the reader.
func cases(t testing.TB, file string) (list []testCase) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.SplitAfter(string(text), "\n") {
		name, opens := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "-- ")
		name, closes := strings.CutSuffix(name, " --")
		if opens && closes {
			list = append(list, testCase{name: name})
		} else if len(list) > 0 {
			list[len(list)-1].text += line
		}
	}
	return list
}

// program returns the path of a program, or skips the test.
func program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("no %s on this machine", name)
	}
	return path
}

// findPython2 returns the path of a Python 2.7, or nothing: few machines have
// one, so no test depends on it.
func findPython2() string {
	home, _ := os.UserHomeDir()
	paths, _ := filepath.Glob(filepath.Join(home, ".pyenv/versions/2.7*/bin/python2.7"))
	for _, path := range append(paths, "python2.7") {
		if exec.Command(path, "-c", "1").Run() == nil {
			return path
		}
	}
	return ""
}

// writeSensor makes a sensor of a shell script.
func writeSensor(t testing.TB, dir, name, script string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := writeScript(filepath.Join(dir, name, "check"), script); err != nil {
		t.Fatal(err)
	}
}

// testSensors returns the sensors of a new directory with one sensor, s.
func testSensors(t testing.TB, script string) *sensors {
	t.Helper()
	dir := t.TempDir()
	if script != "" {
		writeSensor(t, dir, "s", script)
	}
	return newSensors(dir, "check", "options", patience, 2, nil)
}

// A recorder is a monitor that keeps what it gets, and misbehaves on demand.
type recorder struct {
	*monitor // has packages and the next monitor, as a test wants them
	url      *url.URL
	readings chan stored
	tries    atomic.Int64

	mu        sync.Mutex
	misbehave func(w http.ResponseWriter, try int) bool // reports whether it has answered
}

func newRecorder(t testing.TB) *recorder {
	m := &recorder{readings: make(chan stored, 10000)}
	m.monitor = &monitor{stored: func(s stored) error { m.readings <- s; return nil }}
	inner := newHandler(m.methods())
	m.url = serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		try := int(m.tries.Add(1))
		m.mu.Lock()
		misbehave := m.misbehave
		m.mu.Unlock()
		if misbehave == nil || !misbehave(w, try) {
			inner.ServeHTTP(w, r)
		}
	}))
	return m
}

func (m *recorder) set(misbehave func(w http.ResponseWriter, try int) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.misbehave = misbehave
}

// serve serves a handler on loopback until the test ends.
func serve(t testing.TB, h http.Handler) *url.URL {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}
	run := server.Serve
	if h, ok := h.(*handler); ok {
		server, run = h.http, h.serve
	}
	done := make(chan struct{})
	go func() { defer close(done); run(listener) }()
	t.Cleanup(func() { server.Close(); <-done })
	return &url.URL{Scheme: "http", Host: listener.Addr().String(), Path: "/xmlrpc/"}
}

// testSettings are the defaults, for an agent in dir that a test talks to.
func testSettings(t testing.TB, dir string, monitor *url.URL) settings {
	t.Helper()
	s, _, err := (&ini{}).settings(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.path, s.listen, s.monitor = dir, "127.0.0.1:0", monitor
	return s
}

// startAgent runs an agent until the test ends.
func startAgent(t testing.TB, s settings) (*agent, *client) {
	t.Helper()
	a, err := newAgent(s)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.run(ctx) }()
	c := newClient(&url.URL{Scheme: "http", Host: a.listener.Addr().String(), Path: "/xmlrpc"}, patience, nil)
	t.Cleanup(func() {
		c.close()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return a, c
}

// chdir changes the working directory until the test ends (Chdir of
// testing.T is younger than Go 1.21).
func chdir(t *testing.T, dir string) {
	before, err := os.Getwd()
	if err == nil {
		err = os.Chdir(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Chdir(before); err != nil {
			t.Fatal(err)
		}
	})
}

// mustCall calls a method and wants it to succeed.
func mustCall(t testing.TB, c *client, name string, params ...any) any {
	t.Helper()
	v, err := c.call(context.Background(), name, params...)
	if err != nil {
		t.Fatalf("%s%v: %v", name, params, err)
	}
	return v
}

// mark puts a word into the environment of all sensors that are started from
// here on, so that marked finds their processes.
func mark(t *testing.T) string {
	word := fmt.Sprintf("PICKET_TEST_MARK=%s-%d", t.Name(), time.Now().UnixNano())
	name, value, _ := strings.Cut(word, "=")
	t.Setenv(name, value)
	return word
}

// marked lists the processes, zombies too, with that word in the environment.
func marked(t *testing.T, word string) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, file := range files {
		env, _ := os.ReadFile(file) // it may have ended
		if slices.Contains(strings.Split(string(env), "\x00"), word) {
			pid, _ := strconv.Atoi(strings.Split(file, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

// dump is all that an INI text says, one line an option.
func dump(c *ini) string {
	var b strings.Builder
	for _, section := range append([]string{defaults}, c.sections...) {
		fmt.Fprintf(&b, "[%s]\n", section)
		for _, option := range c.options(section) {
			if _, own := c.values[iniKey{section, option}]; !own {
				continue
			}
			if value, err := c.get(section, option); err != nil {
				fmt.Fprintf(&b, "%s: %v\n", option, err)
			} else {
				fmt.Fprintf(&b, "%s = %q\n", option, value)
			}
		}
	}
	return b.String()
}

func TestINI(t *testing.T) {
	files, err := filepath.Glob("testdata/ini/*.ini")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		c, err := parseINI(filepath.Base(file), string(text))
		got := dump(c)
		if err != nil {
			got = err.Error() + "\n"
		} else if c.text() != string(text) {
			t.Errorf("%s: text() is %q", file, c.text())
		}
		golden(t, strings.TrimSuffix(file, ".ini")+".golden", got)
	}
}

// TestINIPython compares with the two parsers whose files these are, as far
// as the dialects agree.
func TestINIPython(t *testing.T) {
	python := program(t, "python3")
	const script = `
import sys
try:
    import ConfigParser as configparser
    c = configparser.SafeConfigParser()
except ImportError:
    import configparser
    c = configparser.ConfigParser(strict=False, inline_comment_prefixes=(';', '#'))
c.read(sys.argv[1])
for s in ['DEFAULT'] + c.sections():
    for o in (c.defaults() if s == 'DEFAULT' else c._sections[s]):
        if o != '__name__':
            try:
                v = c.get(s, o).replace('\n', '\\n')
            except configparser.Error:
                v = 'ERROR'
            print('%s|%s|%s' % (s, o, v))
`
	values := func(c *ini) map[string]string {
		all := make(map[string]string)
		for k := range c.values {
			v, err := c.get(k.section, k.option)
			if err != nil {
				v = "ERROR"
			}
			all[k.section+"|"+k.option] = strings.ReplaceAll(v, "\n", `\n`)
		}
		return all
	}
	ask := func(python, file string) map[string]string {
		out, err := exec.Command(python, "-c", script, file).Output()
		if err != nil {
			t.Fatalf("%s: %v", python, err)
		}
		all := make(map[string]string)
		for _, line := range strings.Split(strings.TrimSuffix(string(out), "\n"), "\n") {
			words := strings.SplitN(line, "|", 3)
			all[words[0]+"|"+words[1]] = words[2]
		}
		return all
	}
	if python2 := findPython2(); python2 != "" {
		for _, file := range []string{"testdata/ini/classic.ini", "testdata/ini/interpolation.ini"} {
			c, err := readINI(file)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := values(c), ask(python2, file); !reflect.DeepEqual(got, want) {
				t.Errorf("%s: got  %q\nwant %q as Python 2.7 has it", file, got, want)
			}
		}
	}
	// What picket wrote, Python 3 reads: without rem lines and "", which it has not.
	file := filepath.Join(t.TempDir(), "written.ini")
	c := &ini{values: make(map[iniKey]iniValue)}
	for i, value := range []string{"", "plain", "100%", "%(none)s", "two\nlines", "a:b=c", "ü", "#", "; x", "x;y", "[x]"} {
		if err := c.set("section", fmt.Sprint("Option", i), value); err != nil {
			t.Logf("%v", err)
		}
	}
	if err := c.set(defaults, "d", "default"); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(file, []byte(c.text()), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := values(c), ask(python, file); !reflect.DeepEqual(got, want) || len(got) < 10 {
		t.Errorf("got  %q\nwant %q as Python 3 has it\n%s", got, want, c.text())
	}
}

func TestINIEdit(t *testing.T) {
	set := func(section, option, value string) func(*ini) error {
		return func(c *ini) error { return c.set(section, option, value) }
	}
	remove := func(names ...string) func(*ini) error {
		return func(c *ini) (err error) {
			found := false
			if len(names) == 1 {
				found, err = c.removeSection(names[0])
			} else {
				found, err = c.removeOption(names[0], names[1])
			}
			if err == nil && !found {
				err = errors.New("not found")
			}
			return err
		}
	}
	tests := []struct {
		before string
		edit   func(*ini) error
		after  string
	}{
		{"[a]\nx = 1\n", set("a", "x", "2"), "[a]\nx = 2\n"},
		{"[a]\nX:1;2  ; why\r\n#c\r\n", set("a", "x", "long value"), "[a]\nX:long value  ; why\r\n#c\r\n"},
		{"[a]\nx =\n", set("a", "x", "1"), "[a]\nx = 1\n"},
		{"[a]\nx = ; why\n", set("a", "x", "1"), "[a]\nx = 1 ; why\n"},
		{"[a]\nx = \"\"\n", set("a", "x", "1"), "[a]\nx = 1\n"},
		{"[a]\nx = 1\ny = 1\n[a]\nx = 2\n", set("a", "x", "3"), "[a]\nx = 1\ny = 1\n[a]\nx = 3\n"},
		{"[a]\nx = 1\n  2\n # c\n  3 ; d\ny = 1\n", set("a", "x", "4"), "[a]\nx = 4\n # c\ny = 1\n"},
		{"[a]\nx = 1 ; c\n\n# e\n[b]", set("a", "x", "p\nq"), "[a]\nx = p ; c\n\tq\n\n# e\n[b]"},
		{"[a]\r\nx = 1", set("a", "y", "2\n3"), "[a]\r\nx = 1\r\ny = 2\r\n\t3\r\n"},
		{"# top\n[a]\nx = 1\n\n# about b\n[b]\n", set("a", "y", "%"), "# top\n[a]\nx = 1\ny = %%\n\n# about b\n[b]\n"},
		{"[a]\n\n[b]\n", set("a", "y", "2"), "[a]\ny = 2\n\n[b]\n"},
		{"[a]\nx = 1\n", set("b", "y", "2"), "[a]\nx = 1\n\n[b]\ny = 2\n"},
		{"", set("b", "Y", ""), "[b]\ny = \n"},
		{"[a]\nx = 1\n", set("DEFAULT", "y", "2"), "[a]\nx = 1\n\n[DEFAULT]\ny = 2\n"},
		{"\xef\xbb\xbf[a]\nx = 1\n", set("a", "x", "2"), "\xef\xbb\xbf[a]\nx = 2\n"},
		{"[DEFAULT]\nx = 1\n[a]\n", set("a", "x", "2"), "[DEFAULT]\nx = 1\n[a]\nx = 2\n"},
		{"[a]\nx = 1\n# c\n  2\ny = 3\nx = 4 ; d\n", remove("a", "X"), "[a]\n# c\ny = 3\n"},
		{"[a]\nx = 1\n# c\n[b]\ny = 2\n[a]\nz = 3\n", remove("a"), "# c\n[b]\ny = 2\n"},
	}
	for _, test := range tests {
		c, err := parseINI("x.ini", test.before)
		if err != nil {
			t.Fatal(err)
		}
		if err := test.edit(c); err != nil || c.text() != test.after {
			t.Errorf("%q: got %q, %v; want %q", test.before, c.text(), err, test.after)
		}
	}

	const text = "[a]\nx = 1\n[DEFAULT]\nz = 1\n"
	refused := map[string]func(*ini) error{
		"an empty line":      set("a", "x", "1\n\n2"),
		"a final newline":    set("a", "x", "1\n"),
		"a carriage return":  set("a", "x", "1\r"),
		"blanks around":      set("a", "x", " 1"),
		"a comment":          set("a", "x", "1 ; 2"),
		"a comment line":     set("a", "x", "1\n#2"),
		"two quotes":         set("a", "x", `""`),
		"no name":            set("a", "", "1"),
		"a name with colon":  set("a", "b:c", "1"),
		"a blank name":       set("a", " b", "1"),
		"a comment's name":   set("a", "#b", "1"),
		"rem":                set("a", "rem b", "1"),
		"a section's name":   set("a", "[b]", "1"),
		"a name of lines":    set("a", "b\nc", "1"),
		"no section":         set("", "x", "1"),
		"a bracket":          set("a]b", "x", "1"),
		"a section of lines": set("a\nb", "x", "1"),
		"unset an option":    remove("a", "z"),
		"unset a section":    remove("b"),
	}
	for name, edit := range refused {
		c, err := parseINI("x.ini", text)
		if err != nil {
			t.Fatal(err)
		}
		if err := edit(c); err == nil || c.text() != text {
			t.Errorf("%s: got %v and %q; want an error and nothing changed", name, err, c.text())
		}
	}
}

func TestINITyped(t *testing.T) {
	c, err := parseINI("x.ini", "[a]\nyes = Yes\noff = OFF\nn = -12\nf = 1.5e3\nword = maybe\n")
	if err != nil {
		t.Fatal(err)
	}
	if v, err := c.getBool("a", "yes"); !v || err != nil {
		t.Error(v, err)
	}
	if v, err := c.getBool("a", "off"); v || err != nil {
		t.Error(v, err)
	}
	if v, err := c.getInt("a", "n"); v != -12 || err != nil {
		t.Error(v, err)
	}
	if v, err := c.getFloat("a", "F"); v != 1500 || err != nil {
		t.Error(v, err)
	}
	_, err1 := c.getBool("a", "word")
	_, err2 := c.getInt("a", "f")
	_, err3 := c.getFloat("a", "word")
	_, err4 := c.get("a", "none")
	_, err5 := c.get("b", "none")
	got := fmt.Sprint(errors.Join(err1, err2, err3, err4, err5))
	want := `x.ini:6: [a] word: "maybe" is not a boolean (yes or no)
x.ini:5: [a] f: "1.5e3" is not a whole number
x.ini:6: [a] word: "maybe" is not a number
x.ini: no option "none" in [a]
x.ini: no section [b]`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if !c.hasSection("a") || c.hasSection("b") || !c.hasOption("a", "N") || c.hasOption("b", "n") {
		t.Error("hasSection, hasOption")
	}
}

func TestSettings(t *testing.T) {
	tests := []struct{ text, want string }{
		{"", ""},
		{"[sensor]\ntimeout = 5m\nconcurrency = 64\nuser = " + strconv.Itoa(os.Geteuid()) + "\n[agent]\nlisten = 127.0.0.1:0\nlog = syslog\n", ""},
		{"[sensor]\nroot = /x\npath = %(root)s/y\n", ""},
		{"[sensor]\npth = x\ntimout = 1\n[Monitor]\n[agents]\nx=1\n[qqqqqqqqqqqq]\n", `c.cfg:2: unknown option "pth" in [sensor] (did you mean "path"?)
c.cfg:3: unknown option "timout" in [sensor] (did you mean "timeout"?)
c.cfg:4: unknown section [Monitor] (did you mean "monitor"?)
c.cfg:5: unknown section [agents] (did you mean "agent"?)
c.cfg:7: unknown section [qqqqqqqqqqqq]`},
		{"[sensor]\ntimeout = 0\nexecutable = a/b\nhelp =\npath =\nuser = no-such-user\nconcurrency = 65\n", `c.cfg:3: [sensor] executable: "a/b" is not a file name
c.cfg:4: [sensor] help: a value is needed
c.cfg:5: [sensor] path: a directory is needed
c.cfg:2: [sensor] timeout: "0" is not a time such as 30, 30s or 5m
c.cfg:7: [sensor] concurrency: "65" is not a whole number from 1 to 64
c.cfg:6: [sensor] user: no user "no-such-user": user: unknown user no-such-user`},
		{"[monitor]\nurl = ftp://u:secret@h/\ntime = UTC\nno_value = none\n[agent]\nlisten = 8080\nqueue = x\nlog = file\n", `c.cfg:2: [monitor] url: "ftp://xxxxx@h/" is neither an http nor an https URL
c.cfg:3: [monitor] time: "UTC" is neither local nor utc
c.cfg:4: [monitor] no_value: "none" is neither nan nor a number
c.cfg:6: [agent] listen: "8080" is not an address such as :8080 or 127.0.0.1:8080
c.cfg:7: [agent] queue: "x" is not a whole number from 1 to 65536
c.cfg:8: [agent] log: "file" is neither stderr nor syslog`},
		{"[monitor]\nurl = http://\n", `c.cfg:2: [monitor] url: "http://" names no host`},
		{"[monitor]\nurl = http://u:secret@h:x/\n", `c.cfg:2: [monitor] url: not a URL such as http://monitor:8081/xmlrpc/`},
		{"[DEFAULT]\nx = %(y)s\n[sensor]\nz = %\n[monitor]\nurl = %(x)s\n", `c.cfg:6: [monitor] url: no option "y" in [monitor] or [DEFAULT] for %(y)s
c.cfg:4: [sensor] z: bad interpolation at "%": %(name)s is a reference, %% a percent sign
c.cfg:2: [sensor] x: no option "y" in [sensor] or [DEFAULT] for %(y)s
c.cfg:4: unknown option "z" in [sensor]`},
	}
	for _, test := range tests {
		c, err := parseINI("c.cfg", test.text)
		if err != nil {
			t.Fatal(err)
		}
		_, warnings, err := c.settings("/dir")
		lines := warnings
		if err != nil {
			lines = append(strings.Split(err.Error(), "\n"), lines...)
		}
		if got := strings.Join(lines, "\n"); got != test.want {
			t.Errorf("%q: got\n%s\nwant\n%s", test.text, got, test.want)
		}
	}
	s, _, err := (&ini{}).settings("/dir")
	if err != nil {
		t.Fatal(err)
	}
	want := settings{
		executable: "check", help: "options", path: "/dir/sensors", backup: "/dir/sensors_backup", timeout: 30 * time.Second, concurrency: 2,
		update: true, keep: 3, maxPackage: 4 << 20, maxUnpacked: 16 << 20,
		monitor: &url.URL{Scheme: "http", Host: "localhost:8081", Path: "/xmlrpc/"}, monitorTimeout: 15 * time.Second, noValue: "nan", spoolSize: 1 << 20,
		listen: ":8080", queue: 256,
	}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("got %+v; want %+v", s, want)
	}
}

// TestShippedConfig: client.cfg shows every option with its default, and the
// README explains it.
func TestShippedConfig(t *testing.T) {
	text := shipped(t, "client.cfg")["client.cfg"]
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	all := regexp.MustCompile(`(?m)^#([a-z_]+ =)`).ReplaceAllString(text, "$1")
	for name, text := range map[string]string{"as it is": text, "with every default": all} {
		c, err := parseINI("client.cfg", text)
		if err != nil {
			t.Fatal(err)
		}
		got, warnings, err := c.settings("")
		want, _, _ := (&ini{}).settings("")
		if err != nil || len(warnings) > 0 || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v, %v; want %+v", name, got, warnings, err, want)
		}
		for _, o := range options {
			if name == "with every default" && !c.hasOption(o.section, o.name) {
				t.Errorf("client.cfg does not show [%s] %s", o.section, o.name)
			}
			if !strings.Contains(string(readme), "`"+o.name+"`") {
				t.Errorf("the README does not explain [%s] %s", o.section, o.name)
			}
		}
	}
	var help bytes.Buffer
	if err := runHelp(context.Background(), invocation{out: &help}); err != nil {
		t.Error(err)
	}
	lines := strings.Split(help.String(), "\n")
	for _, line := range lines {
		if len(line) > 80 || len(lines) > 25 {
			t.Errorf("help is no screen of 80x25: %q, %d lines", line, len(lines))
		}
	}
	for _, c := range subcommands() {
		if c.name != "" && !strings.Contains(string(readme), "`picket "+c.name) {
			t.Errorf("the README does not explain picket %s", c.name)
		}
	}
}

func TestEditINI(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target.cfg"), filepath.Join(dir, "client.cfg")
	if err := os.WriteFile(target, []byte("[a]\nx = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(target, 0o640); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(target, 12, 34); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("target.cfg", link); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(nextFile(target), []byte("left behind by a power cut"), 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(target)
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup // at once, and none is lost
	for i := 0; i < 20; i++ {
		done.Add(1)
		go func(i int) {
			defer done.Done()
			if err := editINI(link, nil, func(c *ini) error { return c.set("a", fmt.Sprint("y", i), "1") }); err != nil {
				t.Error(err)
			}
		}(i)
	}
	done.Wait()
	c, err := readINI(target)
	if err != nil || len(c.values) != 21 {
		t.Errorf("got %v, %v; want 21 values", c.values, err)
	}
	if fi, err := os.Lstat(link); err != nil || fi.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link: %v, %v", fi, err)
	}
	after, err := os.Stat(target)
	if err != nil {
		t.Fatal(err)
	}
	was, is := before.Sys().(*syscall.Stat_t), after.Sys().(*syscall.Stat_t)
	if after.Mode() != before.Mode() || is.Uid != was.Uid || is.Gid != was.Gid {
		t.Errorf("got mode %v of %d:%d; want %v of %d:%d", after.Mode(), is.Uid, is.Gid, before.Mode(), was.Uid, was.Gid)
	}

	// What fails changes nothing: here the temporary file cannot be made.
	if err := os.MkdirAll(nextFile(target)+"/x", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := editINI(link, nil, func(c *ini) error { return c.set("a", "x", "2") }); err == nil {
		t.Error("no error where there is no room for a temporary file")
	}
	if again, err := readINI(target); err != nil || again.text() != c.text() {
		t.Errorf("got %q, %v; want %q", again.text(), err, c.text())
	}
	if _, err := readINI(dir); err == nil {
		t.Error("no error for a directory")
	}
}

func FuzzINI(f *testing.F) {
	files, _ := filepath.Glob("testdata/ini/*.ini")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text), "sensor", "path", "a\nb")
	}
	f.Fuzz(func(t *testing.T, text, section, option, value string) {
		c, err := parseINI("f", text)
		if err != nil {
			return
		}
		if c.text() != text {
			t.Fatalf("text() is %q", c.text())
		}
		before := dump(c) // which must end
		if err := c.set(section, option, value); err != nil {
			if c.text() != text || dump(c) != before {
				t.Fatalf("refused, yet changed: %q", c.text())
			}
			return
		}
		if got, err := c.get(section, option); got != value || err != nil {
			t.Fatalf("got %q, %v", got, err)
		}
		if again, err := parseINI("f", c.text()); err != nil || dump(again) != dump(c) {
			t.Fatalf("reads back as %q, %v; want %q", dump(again), err, dump(c))
		}
		if found, err := c.removeOption(section, option); !found || err != nil {
			t.Fatalf("remove: %v, %v", found, err)
		}
		if _, own := c.values[iniKey{section, strings.ToLower(option)}]; own {
			t.Fatal("still there")
		}
	})
}

func TestSensorName(t *testing.T) {
	for _, good := range []string{"disk", "a", "CPU load", "ünïcode", "-x", "a.b", "a\\b", strings.Repeat("x", 255)} {
		if got, err := sensorName(good); got != good || err != nil {
			t.Errorf("%q: got %q, %v", good, got, err)
		}
	}
	for _, bad := range []any{"", ".", "..", "a/b", "/", "../x", ".hidden", "a\x00", "a\nb", "\xff", strings.Repeat("x", 256), 7, nil, []any{"disk"}} {
		if got, err := sensorName(bad); err == nil {
			t.Errorf("%q: got %q; want an error", bad, got)
		}
	}
}

func TestArguments(t *testing.T) {
	good := []struct {
		v    any
		want []string
	}{
		{nil, []string{}},
		{"", []string{}},
		{"percent /", []string{"percent", "/"}},
		{[]any{}, []string{}},
		{[]any{"used /", "", " x "}, []string{"used /", "", " x "}},
		{[]any{7, int64(-5e9), 2.5, true, false, dateTime("20261122T20:43:21"), []byte("abc")}, []string{"7", "-5000000000", "2.5", "1", "0", "20261122T20:43:21", "abc"}},
	}
	for _, test := range good {
		if got, err := arguments(test.v); err != nil || !slices.Equal(got, test.want) {
			t.Errorf("%v: got %q, %v; want %q", test.v, got, err, test.want)
		}
	}
	for _, bad := range []any{7, true, map[string]any{}, []any{nil}, []any{[]any{}}, []any{[]byte{0}}, "'", strings.Repeat("x", maxArguments), []any{strings.Repeat("x", maxArguments)}} {
		if got, err := arguments(bad); err == nil {
			t.Errorf("%v: got %q; want an error", bad, got)
		}
	}
}

func TestSplitWords(t *testing.T) {
	tests := []struct {
		in   string
		want []string
	}{
		{" a  b\tc\nd ", []string{"a", "b", "c", "d"}},
		{`'a b' "c d" e\ f`, []string{"a b", "c d", "e f"}},
		{`a'b'"c"\d`, []string{"abcd"}},
		{`'' ""`, []string{"", ""}},
		{`'a\b"' "a\b\"'\$"`, []string{`a\b"`, `a\b"'$`}},
		{"a\\\nb \"c\\\nd\"", []string{"ab", "cd"}},
		{"\\\n", []string{}},
		{`$(reboot) *.x ~ ${x} ;|&<>` + "`x`", []string{"$(reboot)", "*.x", "~", "${x}", ";|&<>`x`"}},
		{"ü 'ß'", []string{"ü", "ß"}},
	}
	for _, test := range tests {
		if got, err := splitWords(test.in); err != nil || !slices.Equal(got, test.want) {
			t.Errorf("%q: got %q, %v; want %q", test.in, got, err, test.want)
		}
	}
	for _, bad := range []string{`'`, `"`, `a\`, `'\'`[:2], `"\"`} {
		if got, err := splitWords(bad); err == nil {
			t.Errorf("%q: got %q; want an error", bad, got)
		}
	}
}

// TestSplitWordsShell compares with the shell itself, where it expands nothing.
func TestSplitWordsShell(t *testing.T) {
	const letters = "ab '\"\\ \t"
	var inputs []string
	for n := 0; n < 500; n++ { // every length up to 7, the same each time
		var b strings.Builder
		for i, x := 0, uint32(n)*2654435761; i < n%8; i++ {
			b.WriteByte(letters[x%uint32(len(letters))])
			x /= uint32(len(letters))
		}
		inputs = append(inputs, b.String())
	}
	compared := 0
	for _, in := range inputs {
		got, err := splitWords(in)
		if err != nil || len(got) == 0 {
			continue // the shell waits for more, or takes set -- without words
		}
		out, err := exec.Command("/bin/sh", "-c", "set -- "+in+"\nprintf '<%s>' \"$@\"").Output()
		if want := "<" + strings.Join(got, "><") + ">"; err != nil || string(out) != want {
			t.Errorf("%q: got %q; the shell has %q, %v", in, want, out, err)
		}
		compared++
	}
	if compared < 100 {
		t.Errorf("compared %d only", compared)
	}
}

func TestReading(t *testing.T) {
	tests := []struct {
		script string
		code   int
		value  string
		reason string
	}{
		{"echo 42", 0, "42", ""},
		{"echo; echo ' -0.50 '; echo", 0, "-0.50", ""},
		{"printf 1e6", 0, "1e6", ""},
		{"echo +.5", 0, "+.5", ""},
		{"echo 00012345678901234567890", 0, "00012345678901234567890", ""},
		{"echo 7; echo oops >&2", 0, "7", ""},
		{"echo 7; exit 2", 2, "7", ""},
		{"echo 7 x; exit 2", 2, "", ""},
		{"echo no such thing >&2; exit 3", 3, "", `"no such thing"`},
		{"echo 'a\tb\"' >&2; echo c >&2; exit 255", 255, "", `"a b\" c"`},
		{"exit 65", 65, "", ""},
		{"kill -TERM $$", -15, "", "ended by terminated"},
		{"echo 7; kill -KILL $$", -9, "", "ended by killed"},
		{"echo hello", 65, "", `not a number: "hello"`},
		{"echo 12 KB", 65, "", `not a number: "12 KB"`},
		{"echo 0x1A", 65, "", `not a number: "0x1A"`},
		{"echo nan", 65, "", `not a number: "nan"`},
		{"echo inf", 65, "", `not a number: "inf"`},
		{"echo 1_000", 65, "", `not a number: "1_000"`},
		{"echo 1,5", 65, "", `not a number: "1,5"`},
		{"echo 1e999", 65, "", `not a number: "1e999"`},
		{"echo 1; echo 2", 65, "", `not a number: "1\n2"`},
		{"echo -", 65, "", `not a number: "-"`},
		{"echo e5", 65, "", `not a number: "e5"`},
		{"true", 65, "", `not a number: ""`},
		{"echo 7; head -c 4095 /dev/zero | tr '\\0' ' '", 65, "", "more than 4096 bytes of output"},
		{"echo 7; head -c 4094 /dev/zero | tr '\\0' ' '", 0, "7", ""},
		{"head -c 300000 /dev/zero; exit 4", 4, "", ""},
		{"{ head -c 70000 /dev/zero | tr '\\0' ' '; echo end; } >&2; exit 5", 5, "", `"end"`},
		{"head -c 300000 /dev/zero >&2; exit 5", 5, "", strconv.Quote(strings.Repeat("\x00", 1024))},
		{"printf 4; echo a >&2; sleep 0.05; printf 2; echo b >&2; exit 6", 6, "42", `"a b"`}, // slow enough to be read while it runs
		{"(sleep 60; printf 42) & exit 0", 65, "", `not a number: ""`},                       // nobody waits for who is left
		{"pwd | grep -c \"/s$\"", 0, "1", ""},
		{"echo $#", 0, "2", ""},
		{"echo $1 | tr -d ' '", 0, "12", ""},
		{"[ \"$LC_ALL\" = C ] && cat && echo 5", 0, "5", ""},
	}
	for _, test := range tests {
		s := testSensors(t, test.script)
		r := s.read(context.Background(), "s", []string{"1 2", "*"}, nil)
		if r.code != test.code || r.value != test.value || r.reason != test.reason {
			t.Errorf("%q: got %d %q %q; want %d %q %q", test.script, r.code, r.value, r.reason, test.code, test.value, test.reason)
		}
	}
}

func TestReadingNotStarted(t *testing.T) {
	s := testSensors(t, "echo 1")
	file := filepath.Join(s.path, "s", "check")
	read := func(name string) string {
		r := s.read(context.Background(), name, nil, nil)
		return fmt.Sprint(r.code, r.value, " ", r.reason)
	}
	put := func(text string, mode os.FileMode) string {
		os.RemoveAll(file)
		if err := os.WriteFile(file, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return read("s")
	}
	for _, test := range []struct{ got, want string }{
		{read("none"), "127 no such sensor"},
		{put("#!/bin/sh\necho 1\n", 0o644), "126 .*permission denied"},
		{put("#!/no/such/interpreter\n", 0o755), "126 .*no such file"},
		{put("echo 1\n", 0o755), "126 .*exec format error"},
		{put("\x7fELF\x02\x01\x01", 0o755), "126 .*exec format error"},
		{put("", 0o755), "126 .*exec format error"},
	} {
		if !regexp.MustCompile("^" + test.want).MatchString(test.got) {
			t.Errorf("got %q; want %q", test.got, test.want)
		}
	}
	os.Remove(file)
	if err := os.Mkdir(file, 0o755); err != nil {
		t.Fatal(err)
	}
	if got := read("s"); !strings.HasPrefix(got, "126 ") {
		t.Errorf("a directory: got %q", got)
	}
	os.Remove(file)
	if got := read("s"); got != "127 no such sensor" {
		t.Errorf("no executable: got %q", got)
	}
	if err := os.WriteFile(filepath.Join(s.path, "file"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if got := read("file"); got != "127 no such sensor" {
		t.Errorf("a file: got %q", got)
	}
}

// TestReadingQuick: whether a sensor's output is read while it runs or afterwards
// is decided after 10 ms; nothing is lost, and no file left open, wherever it ends.
func TestReadingQuick(t *testing.T) {
	s := testSensors(t, "printf 1; sleep $1; printf 2; echo x >&2; exit 3")
	files := openFiles(t)
	for i := 0; i < 60; i++ {
		r := s.read(context.Background(), "s", []string{fmt.Sprintf("0.%03d", i/3)}, nil)
		if r.code != 3 || r.value != "12" || r.reason != `"x"` {
			t.Errorf("%d ms: got %+v", i/3, r)
		}
	}
	await(t, "all files are closed", func() bool { return openFiles(t) <= files })
}

// TestReadingTextFileBusy: a sensor that is still open for writing is tried
// again until it is closed.
func TestReadingTextFileBusy(t *testing.T) {
	s := testSensors(t, "echo 1")
	f, err := os.OpenFile(filepath.Join(s.path, "s", "check"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { f.Close() })
	if r := s.read(context.Background(), "s", nil, nil); r.code != 0 || r.value != "1" {
		t.Errorf("got %+v", r)
	}
}

// TestReadingLeavesNothing: whatever a sensor starts, its reading does not
// wait for it, and what stays in the process group is killed.
func TestReadingLeavesNothing(t *testing.T) {
	word := mark(t)
	tests := []struct {
		script  string
		timeout time.Duration
		code    int
		value   string
	}{
		{"sleep 300 & echo 1", patience, 0, "1"},
		{"setsid sleep 300 & echo 1", patience, 0, "1"},
		{"(sleep 300 &) ; echo 1; exit 3", patience, 3, "1"},
		{"trap '' HUP TERM; sleep 300 & sleep 300 & echo 1", patience, 0, "1"},
		{"sleep 300; true", 100 * time.Millisecond, -15, ""},
		{"(sleep 300)", 100 * time.Millisecond, -15, ""},
		{"sleep 300 | cat", 100 * time.Millisecond, -15, ""},
		{"echo 1; exec >&- 2>&-; sleep 300", 100 * time.Millisecond, -15, ""},
		{"trap 'echo 1; exit 0' TERM; sleep 300 & wait", 500 * time.Millisecond, -15, ""},
		{"exec yes", 100 * time.Millisecond, -15, ""},
		{"trap '' TERM; while :; do sleep 300; done", 500 * time.Millisecond, -9, ""},
	}
	var done sync.WaitGroup
	for _, test := range tests {
		s := testSensors(t, test.script)
		s.timeout = test.timeout
		test := test
		done.Add(1)
		go func() {
			defer done.Done()
			begun := time.Now()
			r := s.read(context.Background(), "s", nil, nil)
			if r.code != test.code || r.value != test.value {
				t.Errorf("%q: got %+v; want %d %q", test.script, r, test.code, test.value)
			}
			if took := time.Since(begun); took > patience {
				t.Errorf("%q: took %v", test.script, took)
			}
		}()
	}
	done.Wait()
	for _, pid := range marked(t, word) { // the one that left the group on purpose
		if group, err := syscall.Getpgid(pid); err == nil && group == pid {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	await(t, "all processes have ended", func() bool { return len(marked(t, word)) == 0 })
}

// TestReadingCancelled: what ends the agent ends a sensor.
func TestReadingCancelled(t *testing.T) {
	s := testSensors(t, "echo started >&2; sleep 300")
	ctx, cancel := context.WithCancel(context.Background())
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	go func() {
		bufio.NewReader(r).ReadString('\n')
		cancel()
	}()
	if r := s.read(ctx, "s", nil, w); r.code != -15 {
		t.Errorf("got %+v", r)
	}
	if r := s.read(ctx, "s", nil, nil); r.code != -15 {
		t.Errorf("got %+v", r)
	}
}

// TestReadingStuck: while a process is left that SIGKILL did not end, the
// sensor is not started again.
func TestReadingStuck(t *testing.T) {
	s := testSensors(t, "echo 1")
	s.addStuck("s", 2)
	s.addStuck("s", -1)
	if r := s.read(context.Background(), "s", nil, nil); r.code != codeNotStarted || !strings.Contains(r.reason, "cannot be killed") {
		t.Errorf("got %+v", r)
	}
	s.addStuck("s", -1)
	if r := s.read(context.Background(), "s", nil, nil); r.code != 0 {
		t.Errorf("got %+v", r)
	}
}

// TestReadingLeavesGroup: a sensor that leaves its process group is ended at
// its time-out like any other.
func TestReadingLeavesGroup(t *testing.T) {
	word := mark(t)
	s := testSensors(t, "exec "+program(t, "perl")+" -e 'setpgrp(0, getpgrp(getppid())); sleep 300'")
	s.timeout = 500 * time.Millisecond
	if r := s.read(context.Background(), "s", nil, nil); r.code != -15 {
		t.Errorf("got %+v", r)
	}
	await(t, "it has ended", func() bool { return len(marked(t, word)) == 0 })
}

// TestReadingUser: sensors run as somebody else, with his groups only.
func TestReadingUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can run sensors as another user")
	}
	for _, test := range []struct{ user, want string }{{"daemon", "1 1 1"}, {"1", "1 1 1"}, {"54321", "54321 54321 54321"}} {
		user, err := credential(test.user)
		if err != nil {
			t.Fatal(err)
		}
		s := testSensors(t, "echo $(id -u) $(id -g) $(id -G) >&2; exit 1")
		for dir := s.path; dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		s.user = user
		if r := s.read(context.Background(), "s", nil, nil); r.reason != strconv.Quote(test.want) {
			t.Errorf("%s: got %+v; want %s", test.user, r, test.want)
		}
	}
}

func TestHelpTexts(t *testing.T) {
	s := testSensors(t, "[ \"$1\" = options ] && echo 'x <vol>  one' && echo 'y      two'")
	writeSensor(t, s.path, "mute", "echo why not >&2; exit 7")
	writeSensor(t, s.path, ".hidden", "echo 1")
	if err := os.Mkdir(filepath.Join(s.path, "empty"), 0o755); err != nil {
		t.Fatal(err)
	}
	writeSensor(t, s.path, "silent", "true")
	got, err := s.helpTexts(context.Background())
	want := map[string]string{"silent": "no help: silent options: nothing said", "s": "x <vol>  one\ny      two", "mute": `no help: mute options: exit 7: "why not"`}

	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	s.path += "/none"
	if _, err := s.helpTexts(context.Background()); err == nil {
		t.Error("no error where there is no directory")
	}
}

// TestHelpTextsKept: a sensor is not asked again until its executable changes,
// and no two listings go on at once.
func TestHelpTextsKept(t *testing.T) {
	s := testSensors(t, "echo x; echo >>asked")
	list := func(want int) {
		t.Helper()
		var done sync.WaitGroup
		for i := 0; i < 10; i++ {
			done.Add(1)
			go func() {
				defer done.Done()
				if got, err := s.helpTexts(context.Background()); err != nil || got["s"] != "x" {
					t.Errorf("got %q, %v", got, err)
				}
			}()
		}
		done.Wait()
		if asked, err := os.ReadFile(filepath.Join(s.path, "s", "asked")); err != nil || len(asked) != want {
			t.Errorf("asked %d times, %v; want %d", len(asked), err, want)
		}
	}
	list(1)
	writeSensor(t, s.path, "s", "echo x; echo >>asked; # changed")
	list(2)
}

// TestShippedSensors runs every option of every shipped sensor under every
// small shell there is.
func TestShippedSensors(t *testing.T) {
	shells := map[string][]string{"sh": {"/bin/sh"}}
	for _, other := range [][]string{{"dash"}, {"busybox", "ash"}} {
		if path, err := exec.LookPath(other[0]); err == nil {
			shells[other[0]] = append([]string{path}, other[1:]...)
		}
	}
	if len(shells) < 3 {
		defer t.Skip("without dash or busybox, which are not on this machine") // after what can be tested
	}
	dir := t.TempDir()
	writeTree(t, dir, shipped(t, "sensors/"))
	path := filepath.Join(dir, "sensors")
	names, err := newSensors(path, "check", "options", patience, 1, nil).names()
	if want := []string{"cpu_load", "disk", "memory", "network", "processes", "temperature", "uptime"}; err != nil || !slices.Equal(names, want) {
		t.Fatalf("got %q, %v; want %q", names, err, want)
	}
	var done sync.WaitGroup
	defer done.Wait()
	for shell, words := range shells {
		for _, name := range names {
			env := os.Environ()
			if shell == "busybox" {
				env = []string{"PATH=" + busyboxPath(t, words[0])}
			}
			done.Add(1)
			go func(shell string, words []string, name string) {
				defer done.Done()
				testShippedSensor(t, name, shell, env, append(words[:len(words):len(words)], filepath.Join(path, name, "check")))
			}(shell, words, name)
		}
	}
}

func testShippedSensor(t *testing.T, name, shell string, env, command []string) {
	run := func(args ...string) (stdout, stderr string, code int) {
		cmd := exec.Command(command[0], append(command[1:len(command):len(command)], args...)...)
		var out, errs strings.Builder
		cmd.Stdout, cmd.Stderr, cmd.Env = &out, &errs, env
		cmd.Run()
		return out.String(), errs.String(), cmd.ProcessState.ExitCode()
	}
	help, _, code := run("options")
	if code != 0 || help == "" || len(help) > maxOutput {
		t.Errorf("%s %s options: exit %d, %q", shell, name, code, help)
	}
	var done sync.WaitGroup
	for _, line := range strings.Split(strings.TrimSpace(help), "\n") {
		var args []string
		for _, a := range firstOption(line) {
			args = append(args, a.(string))
		}
		if args[0] == "zone" {
			args = append(args, "0")
		}
		for _, args := range [][]string{args, {strings.Join(args, " ")}} {
			done.Add(1)
			go func(args []string) {
				defer done.Done()
				out, reason, code := run(args...)
				if code == 0 && !regexp.MustCompile(`^-?[0-9]+(\.[0-9]+)?\n$`).MatchString(out) || code != 0 && (out != "" || !strings.HasPrefix(reason, name+": ")) {
					t.Errorf("%s %s %q: exit %d, %q, %q", shell, name, args, code, out, reason)
				}
				if everyBox := name != "temperature" && args[0] != "swap_used_pct"; everyBox && code != 0 {
					t.Errorf("%s %s %q: exit %d, %q; every box has that", shell, name, args, code, reason)
				}
			}(args)
		}
	}
	done.Wait()
	for _, args := range [][]string{{}, {""}, {"nonsense"}, {"$(reboot)"}, {"-x"}, {"*"}, {"options", "more"}, {"a", "b", "c"}, {"percent", "/no/such/dir"}, {"rx_bytes", "../../.."}} {
		if out, reason, code := run(args...); code == 0 || out != "" || strings.Count(reason, "\n") != 1 {
			t.Errorf("%s %s %q: exit %d, %q, %q; want an error of one line", shell, name, args, code, out, reason)
		}
	}
}

// busyboxPath makes a directory with busybox's applets and nothing else.
func busyboxPath(t *testing.T, busybox string) string {
	dir := t.TempDir()
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		t.Fatalf("%s --list: %v", busybox, err)
	}
	for _, applet := range strings.Fields(string(applets)) {
		if err := os.Symlink(busybox, filepath.Join(dir, applet)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// A testQueue's commands wait for the test to end them.
type testQueue struct {
	*queue
	started   chan command
	end       chan reading
	delivered chan string
	discarded chan any
}

func newTestQueue(t *testing.T, concurrency, size int) *testQueue {
	q := &testQueue{
		started: make(chan command, 100), end: make(chan reading),
		delivered: make(chan string, 100), discarded: make(chan any, 100),
	}
	q.queue = newQueue(concurrency, size, func(ctx context.Context, c command) reading {
		q.started <- c
		select {
		case r := <-q.end:
			r.value = c.sensor
			return r
		case <-ctx.Done():
			return reading{code: -15, value: c.sensor}
		}
	}, func(ticket any, r reading) {
		q.delivered <- fmt.Sprintf("%#v %d %s", ticket, r.code, r.value)
	}, func(ticket any) { q.discarded <- ticket })
	t.Cleanup(func() { within(0, q.close) })
	return q
}

func (q *testQueue) submit(t *testing.T, ticket any, sensor string, args ...string) {
	t.Helper()
	if err := q.accept(context.Background(), command{ticket: ticket, sensor: sensor, args: args}, time.Now().Add(patience)); err != nil {
		t.Errorf("%v %s: %v", ticket, sensor, err)
	}
}

func TestQueue(t *testing.T) {
	q := newTestQueue(t, 1, 3)
	q.submit(t, 1, "a", "x")
	receive(t, "start", q.started)
	q.submit(t, 1, "a", "x")    // runs already
	q.submit(t, 2, "b")         //
	q.submit(t, 2, "b")         // waits already
	q.submit(t, "2", "string")  // another ticket
	q.submit(t, int64(2), "i8") // and another: now the queue is full
	q.submit(t, 2, "c")         // takes the place of the one that waits
	err := q.accept(context.Background(), command{ticket: 9, sensor: "z"}, time.Now())
	if f := (*fault)(nil); !errors.As(err, &f) || f.code != faultBusy {
		t.Errorf("full: got %v; want a fault %d", err, faultBusy)
	}
	for i, want := range []string{"1 0 a", "2 0 c", `"2" 0 string`, "2 0 i8"} {
		if i > 0 {
			receive(t, "start", q.started)
		}
		q.end <- reading{}
		if got := receive(t, "delivery", q.delivered); got != want {
			t.Errorf("got %q; want %q", got, want)
		}
	}
}

// TestQueueGivenAway: a running command whose ticket comes again with other
// arguments is not delivered.
func TestQueueGivenAway(t *testing.T) {
	q := newTestQueue(t, 2, 3)
	q.submit(t, 1, "old")
	receive(t, "start", q.started)
	q.submit(t, 1, "new")
	receive(t, "start", q.started)
	q.end <- reading{}
	q.end <- reading{}
	if got := receive(t, "delivery", q.delivered); got != "1 0 new" {
		t.Errorf("got %q", got)
	}
	q.submit(t, 1, "new") // delivered before: it runs again
	q.end <- reading{}
	if got := receive(t, "delivery", q.delivered); got != "1 0 new" {
		t.Errorf("got %q", got)
	}
	if len(q.delivered) != 0 || len(q.discarded) != 3 {
		t.Errorf("%d more delivered, %d discarded; want 0, 3", len(q.delivered), len(q.discarded))
	}
}

// TestQueueJoin: who asks for the change that is under way joins it, but not
// past one that asks something else of the sensor.
func TestQueueJoin(t *testing.T) {
	q := newTestQueue(t, 1, 10)
	for i, c := range []command{{change: "update", sensor: "a"}, {change: "update", sensor: "a"}, {change: "update", sensor: "b"}, {change: "rollback", sensor: "a"}, {change: "update", sensor: "a"}} {
		c.ticket = i
		if err := q.accept(context.Background(), c, time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
	}
	q.submit(t, "r", "a") // a reading waits for none of them
	var ran []string
	for i := 0; i < 5; i++ {
		c := receive(t, "start", q.started)
		ran = append(ran, c.change+" "+c.sensor)
		if i > 0 { // the first two run side by side
			q.end <- reading{}
		}
		if i == 1 {
			q.end <- reading{}
			slices.Sort(ran)
		}
	}
	if want := []string{" a", "update a", "update b", "rollback a", "update a"}; !slices.Equal(ran, want) {
		t.Errorf("ran %q; want %q", ran, want)
	}
	seen := make(map[string]bool)
	for range [6]int{} {
		seen[receive(t, "delivery", q.delivered)] = true
	}
	if len(seen) != 6 || len(q.delivered) > 0 {
		t.Errorf("got %v and %d more; want each of 6 once", seen, len(q.delivered))
	}
}

func TestQueueClose(t *testing.T) {
	q := newTestQueue(t, 2, 10)
	for i := 1; i <= 4; i++ {
		q.submit(t, i, fmt.Sprint("s", i))
	}
	receive(t, "start", q.started)
	receive(t, "start", q.started)
	full := make(chan error, 1)
	go func() {
		for i := 5; ; i++ {
			if err := q.accept(context.Background(), command{ticket: i}, time.Now().Add(patience)); err != nil {
				full <- err
				return
			}
		}
	}()
	await(t, "the queue is full", func() bool { q.mu.Lock(); defer q.mu.Unlock(); return len(q.readings.waiting) == 10 })
	within(0, q.close)
	if err := receive(t, "a fault", full); err == nil || !strings.Contains(err.Error(), "shutting down") {
		t.Errorf("got %v", err)
	}
	if n := len(q.delivered); n != 12 {
		t.Errorf("%d delivered; want every one of 12", n)
	}
	for i := 0; i < 12; i++ {
		if got := <-q.delivered; !strings.Contains(got, " -15 ") {
			t.Errorf("got %q", got)
		}
	}
}

// TestQueueTurns: who floods the queue does not keep another out, who finds
// room although it is full and whose commands are run in turn.
func TestQueueTurns(t *testing.T) {
	q := newTestQueue(t, 1, 8)
	submit := func(ticket int, from string) {
		if err := q.accept(context.Background(), command{ticket: ticket, sensor: from, from: from}, time.Now().Add(patience)); err != nil {
			t.Errorf("%d: %v", ticket, err)
		}
	}
	for i := 0; i < 9; i++ { // one runs, eight wait
		submit(i, "flood")
	}
	var flooded sync.WaitGroup
	for i := 10; i < 20; i++ {
		flooded.Add(1)
		go func(i int) { defer flooded.Done(); submit(i, "flood") }(i)
	}
	await(t, "those outside", func() bool { q.mu.Lock(); defer q.mu.Unlock(); return len(q.outside) == 10 })
	for i := 20; i < 22; i++ {
		submit(i, "monitor") // at once
	}
	var order []string
	for i := 0; i < 21; i++ {
		order = append(order, receive(t, "start", q.started).sensor)
		q.end <- reading{}
	}
	flooded.Wait()
	if got := fmt.Sprint(order[:6]); got != "[flood monitor flood monitor flood flood]" {
		t.Errorf("got %v", got)
	}
}

// TestQueueResize: another concurrency and size are in force at once.
func TestQueueResize(t *testing.T) {
	q := newTestQueue(t, 1, 1)
	q.submit(t, 1, "a")
	q.submit(t, 2, "b")
	receive(t, "start", q.started)
	waited := make(chan error, 1)
	go func() {
		waited <- q.accept(context.Background(), command{ticket: 3, sensor: "c"}, time.Now().Add(patience))
	}()
	await(t, "the third", func() bool { q.mu.Lock(); defer q.mu.Unlock(); return len(q.outside) == 1 })
	q.resize(3, 1)
	if err := receive(t, "room", waited); err != nil {
		t.Error(err)
	}
	receive(t, "start", q.started)
	receive(t, "start", q.started)
	q.resize(1, 1)
	q.submit(t, 4, "d")
	for i := 0; i < 3; i++ {
		if len(q.started) > 0 {
			t.Error("more than one runs")
		}
		q.end <- reading{}
	}
	receive(t, "start", q.started)
	q.end <- reading{}
}

// TestQueueConcurrency: never more run at once than may.
func TestQueueConcurrency(t *testing.T) {
	var running, most atomic.Int64
	delivered := make(chan any, 100)
	q := newQueue(3, 100, func(context.Context, command) reading {
		n := running.Add(1)
		defer running.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		runtime.Gosched()
		return reading{}
	}, func(ticket any, _ reading) { delivered <- ticket }, func(any) {})
	for i := 0; i < 100; i++ {
		if err := q.accept(context.Background(), command{ticket: i}, time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
	}
	for i := 0; i < 100; i++ {
		receive(t, "delivery", delivered)
	}
	within(patience, q.close)
	if most.Load() > 3 {
		t.Errorf("%d ran at once; want at most 3", most.Load())
	}
}

func TestDecodeCall(t *testing.T) {
	files, err := filepath.Glob("testdata/xml/*.xml")
	if err != nil || len(files) < 10 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		message, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		method, params, err := decodeCall(message)
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		golden(t, strings.TrimSuffix(file, ".xml")+".golden", string(encodeCall(method, params...))+"\n")
	}
}

// TestDecodeCallLimits: what just fits is taken; TestBadRequests has what does not.
func TestDecodeCallLimits(t *testing.T) {
	call := func(value string) string {
		return "<methodCall><methodName>m</methodName><params><param>" + value + "</param></params></methodCall>"
	}
	nested := func(n int) string {
		return call(strings.Repeat("<value><array><data>", n) + strings.Repeat("</data></array></value>", n))
	}
	values := func(n int) string {
		return call("<value><array><data>" + strings.Repeat("<value/>", n-1) + "</data></array></value>")
	}
	for _, body := range []string{nested(maxDepth), values(maxValues), call("<value>" + strings.Repeat("x", 50000) + "</value>")} {
		if _, _, err := decodeCall([]byte(body)); err != nil {
			t.Errorf("%.80s: %v", body, err)
		}
	}
}

func TestResponse(t *testing.T) {
	value := map[string]any{"b": []any{nil, true, false, 1, int64(2), 2.5, 1e20}, "a<&>\"'": "\x00\r\n\t\xff ü]]>", "d": dateTime("20261122T20:43:21"), "e": []byte("hello")}
	message := encodeResponse(value, nil)
	const want = `<?xml version="1.0"?><methodResponse><params><param><value><struct>` +
		`<member><name>a&lt;&amp;&gt;&#34;&#39;</name><value><string>` + "\uFFFD&#xD;&#xA;&#x9;\uFFFD ü]]&gt;" + `</string></value></member>` +
		`<member><name>b</name><value><array><data><value><nil/></value><value><boolean>1</boolean></value><value><boolean>0</boolean></value>` +
		`<value><int>1</int></value><value><i8>2</i8></value><value><double>2.5</double></value><value><double>100000000000000000000</double></value></data></array></value></member>` +
		`<member><name>d</name><value><dateTime.iso8601>20261122T20:43:21</dateTime.iso8601></value></member>` +
		`<member><name>e</name><value><base64>aGVsbG8=</base64></value></member></struct></value></param></params></methodResponse>`
	if string(message) != want {
		t.Errorf("got\n%s\nwant\n%s", message, want)
	}
	value["a<&>\"'"] = "\uFFFD\r\n\t\uFFFD ü]]>"
	if got, err := decodeResponse(message); err != nil || !reflect.DeepEqual(got, value) {
		t.Errorf("got %#v, %v; want %#v", got, err, value)
	}
	_, err := decodeResponse(encodeResponse(nil, faultf(7, "no\nway")))
	if f := (*fault)(nil); !errors.As(err, &f) || *f != (fault{7, "no way"}) {
		t.Errorf("got %v", err)
	}
	// An answer that is no fault is one, whatever is in it; a fault likewise.
	for text, want := range map[string]string{
		"<params/>": "<nil> <nil>",
		"<params><param><value/></param><param><value/></param></params>": " <nil>",
		"<fault><value/></fault>": "<nil> fault 0: ",
		"<fault><value><struct><member><name>faultCode</name><value>-7</value></member></struct></value></fault>":             "<nil> fault -7: ",
		"<fault><value><struct><member><name>faultString</name><value><int>3</int></value></member></struct></value></fault>": "<nil> fault 0: 3",
	} {
		v, err := decodeResponse([]byte("<methodResponse>" + text + "</methodResponse>"))
		if got := fmt.Sprintf("%v %v", v, err); got != want {
			t.Errorf("%s: got %q; want %q", text, got, want)
		}
	}
	for _, bad := range []string{
		"", "<html/>", "<methodCall/>", "<methodResponse/>", "<methodResponse><x/></methodResponse>", "<methodResponse><fault/></methodResponse>",
		want + "x", want[:len(want)-1],
	} {
		v, err := decodeResponse([]byte(bad))
		if f := (*fault)(nil); err == nil || errors.As(err, &f) {
			t.Errorf("%.80q: got %v, %v; want an error that is no fault", bad, v, err)
		}
	}
}

// xmlSeeds adds the messages of testdata.
func xmlSeeds(f *testing.F) {
	files, err := filepath.Glob("testdata/xml/*.xml")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, file := range files {
		message, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(message)
	}
}

// FuzzCall: a call that can be read is the same when it is written and read
// again; any other is a fault.
func FuzzCall(f *testing.F) {
	xmlSeeds(f)
	f.Fuzz(func(t *testing.T, message []byte) {
		method, params, err := decodeCall(message)
		if err != nil {
			if f := (*fault)(nil); !errors.As(err, &f) {
				t.Fatalf("%v is no fault", err)
			}
			return
		}
		method2, params2, err := decodeCall(encodeCall(method, params...))
		if err != nil || method2 != method || len(params)+len(params2) > 0 && !reflect.DeepEqual(params2, params) {
			t.Fatalf("%q %#v reads back as %q %#v, %v", method, params, method2, params2, err)
		}
	})
}

// FuzzResponse: a result that can be read is the same when it is written and
// read again; so is a fault.
func FuzzResponse(f *testing.F) {
	xmlSeeds(f)
	f.Add(encodeResponse([]any{1, int64(2), "a", nil, true, []byte("b"), dateTime("20261122T20:43:21"), map[string]any{"x": 2.5}}, nil))
	f.Add(encodeResponse(nil, faultf(1, "x")))
	f.Fuzz(func(t *testing.T, message []byte) {
		v, err := decodeResponse(message)
		sent := (*fault)(nil)
		if err != nil && !errors.As(err, &sent) {
			return
		}
		v2, err2 := decodeResponse(encodeResponse(v, err))
		if !reflect.DeepEqual(v, v2) || !reflect.DeepEqual(err, err2) {
			t.Fatalf("%#v, %v reads back as %#v, %v", v, err, v2, err2)
		}
	})
}

// TestHTTP sends bytes and looks at the head of the answer and what is in it;
// TestBadRequests has what is refused.
func TestHTTP(t *testing.T) {
	h := newHandler([]method{
		{"healthcheck", "string", "OK.", healthcheck},
		{"defect", "string", "", func(request, []any) (any, error) { panic("defect") }},
		{"error", "string", "", func(request, []any) (any, error) { return nil, errors.New("inside") }},
	})
	host := serve(t, h).Host
	health := string(encodeCall("healthcheck"))
	post := func(head, body string) string {
		return "POST " + head + fmt.Sprintf("\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", len(body)) + body
	}
	tests := []struct{ request, want string }{
		{post("/xmlrpc HTTP/1.1", health), "HTTP/1.1 200 .*text/xml.*<string>OK<"},
		{post("/xmlrpc/ HTTP/1.1", health), "HTTP/1.1 200 .*<string>OK<"},
		{post("/RPC2 HTTP/1.1", health), "HTTP/1.1 200 .*<string>OK<"},
		{post("/ HTTP/1.1", health), "HTTP/1.1 200 .*<string>OK<"},
		{post("/xmlrpc HTTP/1.1\r\nContent-Type: application/x-www-form-urlencoded", health), "HTTP/1.1 200 .*<string>OK<"},
		{post("/xmlrpc HTTP/1.1\r\nExpect: 100-continue", health), "HTTP/1.1 100 .*HTTP/1.1 200 .*<string>OK<"},
		{"POST /xmlrpc HTTP/1.0\r\nContent-Length: " + fmt.Sprint(len(health)) + "\r\n\r\n" + health, "HTTP/1.0 200 .*Content-Length: 120.*<string>OK<"},
		{"POST /xmlrpc HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n" + health[:3] + "\r\n" + fmt.Sprintf("%x\r\n", len(health)-3) + health[3:] + "\r\n0\r\n\r\n", "HTTP/1.1 200 .*<string>OK<"},
		{post("/xmlrpc HTTP/1.1\r\nContent-Encoding: identity", health), "HTTP/1.1 200 "},
		{"GET /xmlrpc HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "HTTP/1.1 405 .*Allow: POST\r\n"},
		{"GET /xmlrpc HTTP/1.0\r\n\r\n", "HTTP/1.0 405 .*Allow: POST\r\n"},
		{"POST /xmlrpc HTTP/1.1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 400 "},
		{post("/xmlrpc HTTP/1.1", string(encodeCall("defect"))), "HTTP/1.1 200 .*<int>-32603<"},
		{post("/xmlrpc HTTP/1.1", string(encodeCall("error"))), "HTTP/1.1 200 .*<int>-32603<"},
	}
	for _, test := range tests {
		conn, err := net.Dial("tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		go io.WriteString(conn, test.request) // a refusal may come before its end
		conn.SetReadDeadline(time.Now().Add(patience))
		answer, _ := io.ReadAll(conn) // it may end in a reset
		conn.Close()
		if !regexp.MustCompile("(?s)^" + test.want).Match(answer) {
			t.Errorf("%.100q: got %q; want %q", test.request, answer, test.want)
		}
	}
}

// exchange sends bytes, and nothing after them, and returns what is answered:
// for each response its status or, with 200, what is in it.
func exchange(t *testing.T, host, request string) string {
	t.Helper()
	conn, err := net.Dial("tcp", host)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(patience))
	sent := make(chan struct{})
	go func() { // a refusal may come before the end
		defer close(sent)
		io.WriteString(conn, request)
		conn.(*net.TCPConn).CloseWrite()
	}()
	defer func() { conn.Close(); <-sent }()
	method, _, _ := strings.Cut(request, " ")
	var got []string
	for r := bufio.NewReader(conn); ; {
		resp, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			if len(got) == 0 {
				return "nothing"
			}
			return strings.Join(got, " ")
		}
		body, _ := io.ReadAll(resp.Body) // it may end in a reset
		if resp.StatusCode == http.StatusOK {
			v, err := decodeResponse(body)
			got = append(got, verdict(v, err))
		} else {
			got = append(got, fmt.Sprint(resp.StatusCode))
		}
	}
}

// verdict is the code of a fault, or those in the results of a multicall, or
// the result.
func verdict(v any, err error) string {
	if f := (*fault)(nil); errors.As(err, &f) {
		return fmt.Sprint(f.code)
	}
	results, _ := v.([]any)
	for i, result := range results {
		if f, ok := result.(map[string]any); ok {
			results[i] = f["faultCode"]
		}
	}
	return strings.TrimSuffix(fmt.Sprintf("%v %v", v, err), " <nil>")
}

// TestBadRequests: whatever is sent to an agent, the answer says what is wrong
// with it, and afterwards the agent is as it was.
func TestBadRequests(t *testing.T) {
	lines := logged(t)
	dir := t.TempDir()
	writeSensor(t, dir, "s", "echo 1")
	m := newRecorder(t)
	a, c := startAgent(t, testSettings(t, dir, m.url))
	host := a.listener.Addr().String()
	settled := func() int { // without connections
		c.close()
		a.delivery.monitor().close()
		await(t, "no connections", func() bool {
			stacks := make([]byte, 1<<20)
			stacks = stacks[:runtime.Stack(stacks, true)]
			return !bytes.Contains(stacks, []byte("net/http.(*conn)")) && !bytes.Contains(stacks, []byte("net/http.(*persistConn)"))
		})
		return runtime.NumGoroutine()
	}
	heap := func() uint64 {
		var stats runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&stats)
		return stats.HeapAlloc
	}
	mustCall(t, c, "cmd_submit_reading", 1, "s")
	receive(t, "reading", m.readings)
	health := func() string { // but for what goes on
		return regexp.MustCompile(` (uptime|delivered|refused|rss_kb|last_delivery_age) \d+`).ReplaceAllString(a.healthLine(), "")
	}
	goroutines, bytesBefore, healthBefore := settled(), heap(), health()

	tests := badRequests()
	for _, test := range tests {
		if got := exchange(t, host, test.request); got != test.want {
			t.Errorf("%.200q: got %s; want %s", test.request, got, test.want)
		}
	}

	if v := mustCall(t, c, "healthcheck"); v != "OK" {
		t.Errorf("healthcheck: got %v", v)
	}
	mustCall(t, c, "cmd_submit_reading", 2, "s")
	if got := receive(t, "reading", m.readings); got.ticket != any(2) || got.value != "1" || len(m.readings) != 0 {
		t.Errorf("got %+v, %d more; want ticket 2 alone", got, len(m.readings))
	}
	if strings.Contains(lines.String(), "defect") {
		t.Errorf("got %s", lines)
	}
	await(t, "the goroutines are back", func() bool { return settled() <= goroutines })
	if got := health(); got != healthBefore {
		t.Errorf("got %s; want %s", got, healthBefore)
	}
	bytesAfter := heap()
	if bytesAfter > bytesBefore+8<<20 {
		t.Errorf("heap: got %d bytes; want %d", bytesAfter, bytesBefore)
	}
	total("bad requests refused", len(tests))
	t.Logf("%d requests; heap %d KiB before, %d KiB after; %d goroutines", len(tests), bytesBefore>>10, bytesAfter>>10, goroutines)
}

type badRequest struct{ want, request string }

func badRequests() []badRequest {
	return append(append(badHTTP(), badXML()...), badCalls()...)
}

func badHTTP() []badRequest {
	health := string(encodeCall("healthcheck"))
	n := len(health)
	post := func(head, body string) string {
		return "POST " + head + fmt.Sprintf("\r\nHost: x\r\nContent-Length: %d\r\n\r\n", len(body)) + body
	}
	with := func(header string) string { return post("/xmlrpc HTTP/1.1\r\n"+header, health) }
	raw := func(headers, body string) string {
		return "POST /xmlrpc HTTP/1.1\r\nHost: x\r\n" + headers + "\r\n\r\n" + body
	}
	chunked := func(body string) string { return raw("Transfer-Encoding: chunked", body) }
	whole := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", n, health)
	length := fmt.Sprintf("Content-Length: %d", n)
	return []badRequest{
		// methods
		{"405", "GET /xmlrpc HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"405", "HEAD /xmlrpc HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"405", "PUT /xmlrpc HTTP/1.1\r\nHost: x\r\n" + length + "\r\n\r\n" + health},
		{"405", "DELETE / HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"405", "TRACE / HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"405", "OPTIONS /RPC2 HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"404", "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"404", "CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"405", "post /xmlrpc HTTP/1.1\r\nHost: x\r\n" + length + "\r\n\r\n" + health},
		{"405", "X /xmlrpc HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"400", "P(ST /xmlrpc HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"400", "P\x00ST /xmlrpc HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"400", " POST /xmlrpc HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"404", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
		// paths
		{"404", post("/other HTTP/1.1", health)},
		{"404", post("/XMLRPC HTTP/1.1", health)},
		{"404", post("/xmlrpc/x HTTP/1.1", health)},
		{"404", post("/xmlrpc// HTTP/1.1", health)},
		{"404", post("//xmlrpc HTTP/1.1", health)},
		{"404", post("/./xmlrpc HTTP/1.1", health)},
		{"404", post("/xmlrpc/../../etc/passwd HTTP/1.1", health)},
		{"404", post("/%2e%2e/xmlrpc HTTP/1.1", health)},
		{"404", post("/xmlrpc%00 HTTP/1.1", health)},
		{"404", post("/RPC2/ HTTP/1.1", health)},
		{"404", post("http://x/other HTTP/1.1", health)},
		{"400", post("/xml%zz HTTP/1.1", health)},
		{"400", post("xmlrpc HTTP/1.1", health)},
		{"400", post("/xml rpc HTTP/1.1", health)},
		{"400", post("/xml\x01rpc HTTP/1.1", health)},
		{"400", post("http://[/xmlrpc HTTP/1.1", health)},
		{"431", post("/"+strings.Repeat("x", maxHeader)+" HTTP/1.1", health)},
		// versions
		{"400", "nonsense\r\n\r\n"},
		{"400", "\r\n\r\n"},
		{"nothing", ""},
		{"400", "POST"},
		{"400", "POST /xmlrpc HTTP/1.1\r\nHost: x\r\n"},
		{"400", "POST /xmlrpc\r\n\r\n"},
		{"505", post("/xmlrpc HTTP/0.9", health)},
		{"505", post("/xmlrpc HTTP/2.0", health)},
		{"505", post("/xmlrpc HTTP/3.0", health)},
		{"400", post("/xmlrpc HTTP/1.", health)},
		{"400", post("/xmlrpc HTTP/-1.1", health)},
		{"400", post("/xmlrpc http/1.1", health)},
		{"400", post("/xmlrpc HTTPS/1.1", health)},
		{"400", "\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"},
		{"411", "POST /xmlrpc HTTP/1.0\r\n\r\n" + health},
		// headers
		{"400", "POST /xmlrpc HTTP/1.1\r\n" + length + "\r\n\r\n" + health},
		{"400", with("Host: y")},
		{"400", "POST /xmlrpc HTTP/1.1\r\nHost: x y/\r\n\r\n"},
		{"400", with("no colon")},
		{"400", with("X : space")},
		{"400", with("X\x00: nul")},
		{"400", with("X: \x00")},
		{"400", with("X: a\rb")},
		{"400", raw(" folded: x", "")},
		{"431", with("X: " + strings.Repeat("x", maxHeader))},
		{"431", with(strings.Repeat("x", maxHeader) + ": x")},
		{"431", with(strings.Repeat("X: y\r\n", maxHeader/6) + "X: y")},
		{"417", with("Expect: the unexpected")},
		{"415", with("Content-Encoding: gzip")},
		{"415", with("Content-Encoding: br")},
		{"415", with("Content-Encoding: identity, gzip")},
		{"415", with("Content-Encoding: x")},
		// lengths
		{"411", raw("X: y", "")},
		{"411 400", raw("Content-Length:", health)},
		{"400", raw("Content-Length: -1", health)},
		{"400", raw("Content-Length: +5", health)},
		{"400", raw("Content-Length: 0x10", health)},
		{"400", raw("Content-Length: 1e2", health)},
		{"400", raw("Content-Length: 5, 5", health)},
		{"400", raw("Content-Length: 99999999999999999999", health)},
		{"400", raw(length+fmt.Sprintf("\r\nContent-Length: %d", n+1), health)},
		{"413", raw("Content-Length: 524289", health)},
		{"413", raw("Content-Length: 9223372036854775807", health)},
		{"400", raw(fmt.Sprintf("Content-Length: %d", n+1), health)},
		{"400", raw("Content-Length: 524288", health)},
		{"-32700", raw("Content-Length: 0", "")},
		{"-32700 400", raw("Content-Length: 0", health)},
		{"-32700", raw(fmt.Sprintf("Content-Length: %d", n-1), health)},
		{"-32600", post("/xmlrpc HTTP/1.1", strings.Repeat(" ", maxMessage))},
		{"413", post("/xmlrpc HTTP/1.1", strings.Repeat(" ", maxMessage+1))},
		// chunks
		{"400", chunked("")},
		{"400", chunked("xyz\r\n")},
		{"400", chunked("-1\r\n")},
		{"400", chunked("fffffffffffffffff\r\n")},
		{"400", chunked("7fffffffffffffff\r\n" + health)},
		{"400", chunked("3\r\nabcdef\r\n0\r\n\r\n")},
		{"400", chunked(fmt.Sprintf("%x\r\n%s\r\n", n, health))},
		{"400", chunked(strings.Repeat("0", 5000) + "\r\n\r\n")},
		{"400", chunked("5;" + strings.Repeat("x", 5000) + "\r\nhello\r\n0\r\n\r\n")},
		{"-32700", chunked("0\r\n\r\n")},
		{"413", chunked("80001\r\n" + strings.Repeat(" ", 0x80001) + "\r\n0\r\n\r\n")},
		{"413", chunked(strings.Repeat("8000\r\n"+strings.Repeat(" ", 0x8000)+"\r\n", 17) + "0\r\n\r\n")},
		{"501", raw("Transfer-Encoding: gzip", health)},
		{"501", raw("Transfer-Encoding: gzip, chunked", whole)},
		{"501", raw("Transfer-Encoding: identity\r\n"+length, health)},
		{"400", raw("Transfer-Encoding: \x0bchunked", whole)},
		{"501", raw("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", whole)},
		// one request that others could take for two, and several at once
		{"OK", raw("Transfer-Encoding: chunked\r\n"+length, whole)},
		{"-32700 400", raw("Transfer-Encoding: chunked\r\nContent-Length: 100", "0\r\n\r\nsmuggled")},
		{"OK 405 404 OK", with("X: y") + "GET / HTTP/1.1\r\nHost: x\r\n\r\n" + post("/other HTTP/1.1", "x") + with("X: y")},
		{"-32700 OK 400", post("/ HTTP/1.1", "x") + with("X: y") + "nonsense\r\n\r\n" + with("X: y")},
		{strings.TrimSpace(strings.Repeat("-32700 ", 100)), strings.Repeat(post("/ HTTP/1.1", "x"), 100)},
		{"OK", with("Connection: close") + with("X: y")},
		{"OK", with("Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")},
	}
}

// posted is the request with that body.
func posted(body string) string {
	return fmt.Sprintf("POST /xmlrpc HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

func badXML() []badRequest {
	call := func(value string) string {
		return "<methodCall><methodName>m</methodName><params><param>" + value + "</param></params></methodCall>"
	}
	nested := func(n int, open, close string) string {
		return call(strings.Repeat(open, n) + strings.Repeat(close, n))
	}
	bomb := "<!DOCTYPE m [<!ENTITY a \"ha\">"
	for c := 'b'; c <= 'z'; c++ {
		bomb += fmt.Sprintf("<!ENTITY %c \"%s\">", c, strings.Repeat(fmt.Sprintf("&%c;", c-1), 10))
	}
	tests := []badRequest{
		// not well-formed
		{"-32700", " "},
		{"-32700", "\x00"},
		{"-32700", "<"},
		{"-32700", "<>"},
		{"-32700", "< methodCall/>"},
		{"-32700", "<methodCall"},
		{"-32700", "<methodCall>"},
		{"-32700", "</methodCall>"},
		{"-32600", "<methodcall></methodCall>"},
		{"-32700", "hello"},
		{"-32700", "{\"jsonrpc\": \"2.0\"}"},
		{"-32700", "method=healthcheck"},
		{"-32700", "\x1f\x8b\x08\x00\x00\x00\x00\x00"},
		{"-32700", "x" + call("<value/>")},
		{"-32700", call("<value/>") + "x"},
		{"-32700", call("<value/>") + call("<value/>")},
		{"-32700", call("<value/>") + "<!DOCTYPE m>"},
		{"-32700", call("<value><i4>1</int></value>")},
		{"-32700", call("<value><i4>1</value></i4>")},
		{"-32700", call("<value")},
		{"-32700", call("<value a='1></value>")},
		{"-32700", call("<value a></value>")},
		{"-32700", call("<value>a < b</value>")},
		{"-32700", call("<value>a & b</value>")},
		{"-32700", call("<value>]]></value>")},
		{"-32700", call("<value><![CDATA[x</value>")},
		{"-32700", call("<value><!-- -- --></value>")},
		{"-32700", call("<value><!-- </value>")},
		{"-32700", call("<value><?x</value>")},
		{"-32700", call("<value>\x0b</value>")},
		{"-32700", call("<value>\x00</value>")},
		{"-32700", call("<value>\xc0\x80</value>")},
		{"-32700", call("<value>\xed\xa0\x80</value>")},
		{"-32700", call("<value>\uFFFF</value>")},
		// entities and DOCTYPEs
		{"-32700", call("<value>&nbsp;</value>")},
		{"-32700", call("<value>&amp</value>")},
		{"-32700", call("<value>&#;</value>")},
		{"-32700", call("<value>&#0;</value>")},
		{"-32700", call("<value>&#x110000;</value>")},
		{"-32700", call("<value>&#99999999999999999999;</value>")},
		{"-32700", bomb + "]>" + call("<value>&z;</value>")},
		{"-32700", "<!DOCTYPE m SYSTEM \"file:///etc/passwd\">" + call("<value>&m;</value>")},
		{"-32700", "<!DOCTYPE m [<!ENTITY x SYSTEM \"file:///etc/passwd\">]>" + call("<value>&x;</value>")},
		{"-32700", "<!DOCTYPE m [<!ENTITY % x SYSTEM \"http://127.0.0.1/\"> %x;]>" + call("<value>&x;</value>")},
		{"-32700", "<!DOCTYPE m [" + call("<value/>")},
		{"-32700", "<methodCall><!DOCTYPE m><methodName>m</methodName></methodCall>"},
		{"-32600", "<!DOCTYPE m [<!--" + strings.Repeat("x", maxToken) + "-->]>" + call("<value/>")},
		// encodings
		{"-32700", `<?xml version="1.0" encoding="UTF-16"?>` + call("<value/>")},
		{"-32700", `<?xml version="1.0" encoding="UTF-7"?>` + call("<value/>")},
		{"-32700", `<?xml version="1.0" encoding="windows-1252"?>` + call("<value/>")},
		{"-32700", `<?xml version="1.0" encoding="../../x"?>` + call("<value/>")},
		{"-32700", `<?xml version="1.0" encoding="UTF-8"?>` + call("<value>\xfc</value>")},
		{"-32700", `<?xml version="1.0" encoding="US-ASCII"?>` + call("<value>\xfc</value>")},
		{"-32700", `<?xml version="1.1"?>` + call("<value/>")},
		{"-32700", `<?xml version="1.0"?><?xml version="1.0"?>` + call("<value/>")},
		{"-32700", "\n" + `<?xml version="1.0"?>` + call("<value/>")},
		{"-32700", "\xef\xbb\xbf\xef\xbb\xbf" + call("<value/>")},
		{"-32700", "\xfe\xff\x00<\x00m"},
		{"-32700", "\xff\xfe<\x00m\x00"},
		// wrong roots and order
		{"-32600", "<methodResponse/>"},
		{"-32600", "<fault/>"},
		{"-32600", "<methodcall/>"},
		{"-32600", "<html><body>hello</body></html>"},
		{"-32600", "<Envelope xmlns='http://schemas.xmlsoap.org/soap/envelope/'/>"},
		{"-32600", "<methodCall/>"},
		{"-32600", "<methodCall>m</methodCall>"},
		{"-32600", "<methodCall><params/></methodCall>"},
		{"-32600", "<methodCall><methodName/></methodCall>"},
		{"-32600", "<methodCall><methodName>m<x/></methodName></methodCall>"},
		{"-32600", "<methodCall><methodName>m</methodName><methodName>m</methodName></methodCall>"},
		{"-32600", "<methodCall><methodName>m</methodName><params/><params/></methodCall>"},
		{"-32600", "<methodCall><methodName>m</methodName><params>1</params></methodCall>"},
		{"-32600", "<methodCall><methodName>m</methodName><params><value/></params></methodCall>"},
		{"-32600", call("")},
		{"-32600", call("1")},
		{"-32600", call("<value/><value/>")},
		// depth, number and length
		{"-32600", nested(33, "<value><array><data>", "</data></array></value>")},
		{"-32600", nested(33, "<value><struct><member><name>x</name>", "</member></struct></value>")},
		{"-32600", nested(9000, "<value><array><data>", "</data></array></value>")},
		{"-32600", nested(20000, "<x>", "</x>")},
		{"-32600", call("<value><array><data>" + strings.Repeat("<value/>", maxValues) + "</data></array></value>")},
		{"-32600", "<methodCall><methodName>m</methodName><params>" + strings.Repeat("<param><value/></param>", maxValues+1) + "</params></methodCall>"},
		{"-32600", call("<value>" + strings.Repeat("x", maxToken+1) + "</value>")},
		{"-32600", call("<value><![CDATA[" + strings.Repeat("x", maxToken) + "]]></value>")},
		{"-32600", call("<value><" + strings.Repeat("x", maxToken) + "/></value>")},
		{"-32600", call("<value " + strings.Repeat("a='' ", maxToken/4) + "/>")},
		{"-32600", call("<value a='" + strings.Repeat("x", maxToken) + "'/>")},
		{"-32600", "<!--" + strings.Repeat("x", maxToken) + "-->" + call("<value/>")},
		{"-32600", "<?x " + strings.Repeat("x", maxToken) + "?>" + call("<value/>")},
		{"-32600", "<methodCall><methodName>" + strings.Repeat("m", maxToken+1) + "</methodName></methodCall>"},
		{"-32601", "<methodCall><methodName>" + strings.Repeat("m", maxToken/2) + "</methodName></methodCall>"},
		// and more of each
		{"-32700", " \n"},
		{"-32700", "GET / HTTP/1.0"},
		{"-32700", "<methodCall><methodName>m</methodCall></methodName>"},
		{"-32700", call("<value>&lol;</value>")},
		{"-32700", "<!DOCTYPE m [<!ENTITY lol \"x\">]>" + call("<value>&lol;</value>")},
		{"-32700", call("<value>\x01</value>")},
		{"-32700", call("<value>\xff</value>")},
		{"-32700", call("<value>a]]>b</value>")},
		{"-32700", call("<value><!-- a -- b --></value>")},
		{"-32700", call("<value a=b/>")},
		{"-32700", `<?xml version="1.0" encoding="EBCDIC"?>` + call("")},
		{"-32700", `<?xml version="1.0" encoding="UTF-16"?>` + call("")},
		{"-32700", `<?xml version="2.0"?>` + call("")},
		{"-32700", ` <?xml version="1.0"?>` + call("<value/>")},
		{"-32700", call("<value/>") + "<x/>"},
		{"-32600", "<methodResponse><params><param><value/></param></params></methodResponse>"},
		{"-32600", "<methodCall><methodName> </methodName></methodCall>"},
		{"-32600", "<methodCall><methodName><b>m</b></methodName></methodCall>"},
		{"-32600", "<methodCall>x<methodName>m</methodName></methodCall>"},
		{"-32600", "<methodCall><params/><methodName>m</methodName></methodCall>"},
		{"-32600", "<methodCall><methodName>m</methodName><x/></methodCall>"},
		{"-32600", "<methodCall><methodName>m</methodName><params><param/></params></methodCall>"},
		{"-32600", call("<x/>")},
		{"-32600", call("<value>a<int>1</int></value>")},
		{"-32600", call("<value><int>1</int>a</value>")},
		{"-32600", call("<value><int>1<b/></int></value>")},
		{"-32600", call("<value><int>1.5</int></value>")},
		{"-32600", call("<value><int>0x10</int></value>")},
		{"-32600", call("<value><i1>128</i1></value>")},
		{"-32600", call("<value><i2>-32769</i2></value>")},
		{"-32600", call("<value><double>inf</double></value>")},
		{"-32600", call("<value><double>1e999</double></value>")},
		{"-32600", call("<value><dateTime.iso8601>yesterday</dateTime.iso8601></value>")},
		{"-32600", call("<value><dateTime.iso8601>20261322T20:43:21</dateTime.iso8601></value>")},
		{"-32600", call("<value><struct><member><value/><name>a</name></member></struct></value>")},
		{"-32600", "<methodCall " + strings.Repeat(`a=""`, maxToken/4) + "><methodName>m</methodName></methodCall>"},
		{"-32600", call("<value>" + strings.Repeat("x", maxToken) + "</value>")},
		{"-32600", `<?xml version="1.0" encoding="latin1"?>` + call("<value "+strings.Repeat(`a=""`, maxToken/2)+"/>")},
		{"-32600", call("<value/>") + "<!--" + strings.Repeat("x", maxToken) + "-->"},
	}
	// values
	for _, value := range []string{
		"<int></int>", "<int> </int>", "<int>x</int>", "<int>1.0</int>", "<int>1e3</int>", "<int>0x1</int>", "<int>1_000</int>", "<int>1 2</int>",
		"<int>--1</int>", "<int>٣</int>", "<int>2147483648</int>", "<int>-2147483649</int>", "<i4>4294967296</i4>", "<i2>32768</i2>", "<i1>-129</i1>",
		"<i8>9223372036854775808</i8>", "<i8>-9223372036854775809</i8>", "<i8/>", "<int><int>1</int></int>", "<int>1</int><int>1</int>", "1<int>1</int>", "<int>1</int>1",
		"<boolean>true</boolean>", "<boolean>2</boolean>", "<boolean>01</boolean>", "<boolean/>",
		"<double>nan</double>", "<double>-inf</double>", "<double>1e400</double>", "<double>1,5</double>", "<double>0x1p4</double>", "<double>.</double>", "<double/>",
		"<dateTime.iso8601/>", "<dateTime.iso8601>now</dateTime.iso8601>", "<dateTime.iso8601>20260230T00:00:00</dateTime.iso8601>", "<dateTime.iso8601>20261122T25:00:00</dateTime.iso8601>",
		"<base64>!</base64>", "<base64>YQ</base64>", "<base64>YQ==YQ==</base64>", "<base64>YQ=</base64>", "<base64>__--</base64>",
		"<nil>x</nil>", "<nil><nil/></nil>", "<float128>1</float128>", "<INT>1</INT>", "<value/>", "<data/>",
		"<array/>", "<array>x</array>", "<array><data/><data/></array>", "<array><data>x</data></array>", "<array><value/></array>", "<array><data><int>1</int></data></array>",
		"<struct>x</struct>", "<struct><member/></struct>", "<struct><name>a</name></struct>", "<struct><member><name>a</name></member></struct>",
		"<struct><member><value/></member></struct>", "<struct><member><name>a</name><value/><value/></member></struct>", "<struct><member><name><b/></name><value/></member></struct>",
	} {
		tests = append(tests, badRequest{"-32600", call("<value>" + value + "</value>")})
	}
	for i := range tests {
		tests[i].request = posted(tests[i].request)
	}
	return tests
}

func badCalls() []badRequest {
	type row struct {
		want, method string
		params       []any
	}
	list := func(v ...any) []any { return v }
	tests := []row{
		{"-32601", "nope", nil},
		{"-32601", "Healthcheck", nil},
		{"-32601", "healthcheck\x00", nil},
		{"-32601", "system.", nil},
		{"-32601", "system.shutdown", nil},
		{"-32601", "cmd_store_probe_data", list(1, list(0, "1"), dateTime("20261122T20:43:21"))},
		{"-32601", "cmd_get_sensor_code", list("s")},
		{"-32602", "healthcheck", list(1)},
		{"-32602", "healthcheck", list(nil)},
		{"-32602", "cmd_list_sensors", list("s")},
		{"-32602", "cmd_list_sensors", list(list())},
		{"-32602", "cmd_submit_reading", nil},
		{"-32602", "cmd_submit_reading", list(7)},
		{"-32602", "cmd_submit_reading", list(7, "s", "", "")},
		{"-32602", "cmd_submit_reading", list("s", 7)},
		{"-32602", "cmd_submit_reading", list(map[string]any{"ticket": 7, "sensor": "s"})},
		{"-32602", "cmd_update_sensor_code", nil},
		{"-32602", "cmd_update_sensor_code", list("s", 7, 7)},
		{"-32602", "cmd_update_sensor_code", list(7, "s")},
		{"-32602", "cmd_rollback_sensor_code", nil},
		{"-32602", "cmd_rollback_sensor_code", list("s", 7, 7)},
		{"-32602", "cmd_rollback_sensor_code", list(7, "s")},
		{"-32602", "cmd_register_new_server", list(7, 7)},
		{"-32602", "cmd_register_new_server", list(list("http://127.0.0.1/"))},
		{"-32602", "system.listMethods", list("x")},
		{"-32602", "system.getCapabilities", list("x")},
		{"-32602", "system.methodHelp", nil},
		{"-32602", "system.methodHelp", list(1)},
		{"-32602", "system.methodHelp", list("nope")},
		{"-32602", "system.methodHelp", list("healthcheck", "healthcheck")},
		{"-32602", "system.methodSignature", nil},
		{"-32602", "system.methodSignature", list(list())},
		{"-32602", "system.methodSignature", list("nope")},
		{"-32602", "system.multicall", nil},
		{"-32602", "system.multicall", list("x")},
		{"-32602", "system.multicall", list(map[string]any{"methodName": "healthcheck"})},
		{"-32602", "system.multicall", list(list(), list())},
		{"-32602", "system.multicall", list(make([]any, maxCalls+1))},
	}
	for _, name := range []any{
		"", ".", "..", ".hidden", "/", "a/b", "../s", "/etc", "s/", "s/../s", "a\nb", "s\n", "a\tb", "a\x00b", "a\x7fb", "\u202es", "\u200b", "\uFFFD", strings.Repeat("x", maxName+1),
		nil, 7, int64(7), 1.5, true, dateTime("20261122T20:43:21"), []byte("s"), list("s"), map[string]any{},
	} {
		tests = append(tests, row{"-32602", "cmd_submit_reading", list(7, name)}, row{"-32602", "cmd_update_sensor_code", list(name)}, row{"-32602", "cmd_rollback_sensor_code", list(name, 7)})
	}
	for _, ticket := range []any{1.5, true, dateTime("20261122T20:43:21"), []byte("7"), list(), list(7), map[string]any{"ticket": 7}, strings.Repeat("x", maxTicket+1)} {
		tests = append(tests, row{"-32602", "cmd_submit_reading", list(ticket, "s")}, row{"-32602", "cmd_update_sensor_code", list("s", ticket)},
			row{"-32602", "cmd_rollback_sensor_code", list("s", ticket)}, row{"-32602", "cmd_register_new_server", list(ticket)})
	}
	for _, args := range []any{
		7, int64(7), 1.5, true, dateTime("20261122T20:43:21"), []byte("x"), map[string]any{},
		"'", "\"", "'a' 'b", "a\"b", "\"\\\"", "\\", "a\\", strings.Repeat("x", maxArguments), strings.Repeat("x ", maxArguments/2+1),
		list(nil), list(list()), list("a", map[string]any{}), list([]byte("a\x00b")), list(strings.Repeat("x", maxArguments)), append(make([]any, 0), list("x", strings.Repeat("x", maxArguments-2))...),
	} {
		tests = append(tests, row{"-32602", "cmd_submit_reading", list(7, "s", args)})
	}
	nested := map[string]any{"methodName": "system.multicall", "params": list(list())}
	for _, call := range []struct {
		want int
		call any
	}{
		{faultParams, nil},
		{faultParams, "healthcheck"},
		{faultParams, list("healthcheck")},
		{faultParams, map[string]any{}},
		{faultParams, map[string]any{"methodName": 7}},
		{faultParams, map[string]any{"params": list()}},
		{faultParams, map[string]any{"methodName": "healthcheck", "params": "x"}},
		{faultParams, map[string]any{"methodName": "healthcheck", "params": map[string]any{}}},
		{faultParams, map[string]any{"methodName": "healthcheck", "params": list(1)}},
		{faultParams, map[string]any{"methodName": "cmd_submit_reading", "params": list(7, "../s")}},
		{faultParams, nested},
		{faultMethod, map[string]any{"methodName": "", "params": list()}},
		{faultMethod, map[string]any{"methodName": "nope", "params": list()}},
		{faultMethod, map[string]any{"methodName": " healthcheck", "params": list()}},
	} {
		tests = append(tests, row{fmt.Sprint(list(call.want)), "system.multicall", list(list(call.call))})
	}
	var bad []badRequest
	for _, test := range tests {
		bad = append(bad, badRequest{test.want, posted(string(encodeCall(test.method, test.params...)))})
	}
	return bad
}

// TestConnections: many that hold connections do not keep out one who calls.
func TestConnections(t *testing.T) {
	h := newHandler([]method{{"healthcheck", "string", "OK.", healthcheck}})
	u := serve(t, h)
	for i := 0; i < 3*maxConns; i++ {
		conn, err := net.Dial("tcp", u.Host)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if i%2 == 0 {
			io.WriteString(conn, "POST /xmlrpc HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n<?xml")
		}
	}
	c := newClient(u, patience, nil)
	defer c.close()
	for i := 0; i < 10; i++ {
		if v := mustCall(t, c, "healthcheck"); v != "OK" {
			t.Errorf("got %v", v)
		}
	}
	await(t, "no more than the limit", func() bool { h.mu.Lock(); defer h.mu.Unlock(); return len(h.conns) <= maxConns })
}

// TestWeakest: whoever comes when all connections are taken gets one, unless he
// holds the most.
func TestWeakest(t *testing.T) {
	for _, test := range []struct {
		name    string
		hosts   []string // of 64 connections, in turn
		working bool
		comes   string
		gives   string // whose connection gives way
	}{
		{"a hog with one address", []string{"10.0.0.2"}, true, "10.0.0.9", `10\.0\.0\.2`},
		{"a hog with four", []string{"10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"}, true, "10.0.0.9", `10\.0\.0\.[2-5]`},
		{"a neighbour", []string{"2001:db8::bad"}, true, "2001:db8::1", `2001:db8::bad`},
		{"idle ones", []string{"10.0.0.2", "10.0.0.3"}, false, "10.0.0.9", `10\.0\.0\.[23]`},
		{"himself", []string{"10.0.0.9"}, true, "10.0.0.9", `10\.0\.0\.9`},
		{"one that may not call", []string{"10.0.0.2"}, true, "192.168.0.1", `192\.168\.0\.1`},
	} {
		h := newHandler(nil)
		h.setAccess(&access{allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}})
		admit := func(host string) net.Conn {
			c, other := net.Pipe()
			t.Cleanup(func() { c.Close(); other.Close() })
			return h.admit(addressed{c, &net.TCPAddr{IP: net.ParseIP(host), Port: 1}})
		}
		for i := 0; i < maxConns; i++ {
			h.conns[admit(test.hosts[i%len(test.hosts)])].working = test.working
		}
		before := maps.Clone(h.conns)
		c := admit(test.comes)
		if _, stays := h.conns[c]; !stays {
			before[c] = &connState{host: test.comes}
		}
		for c := range h.conns {
			delete(before, c)
		}
		if len(before) != 1 || h.count.Load() != 1 {
			t.Errorf("%s: %d gave way, %d counted", test.name, len(before), h.count.Load())
		}
		for _, s := range before {
			if !regexp.MustCompile("^" + test.gives + "$").MatchString(s.host) {
				t.Errorf("%s: %s gave way", test.name, s.host)
			}
		}
	}
}

// An addressed connection comes from that address.
type addressed struct {
	net.Conn
	remote net.Addr
}

func (a addressed) RemoteAddr() net.Addr { return a.remote }

// TestLargeMessages: whoever sends large messages slowly does not keep those of
// others waiting.
func TestLargeMessages(t *testing.T) {
	h := newHandler([]method{{"healthcheck", "string", "OK.", healthcheck}})
	u := serve(t, h)
	hog := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	for i := 0; i < 10; i++ {
		conn, err := hog.Dial("tcp", u.Host)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n%s", strings.Repeat(" ", 2*smallMessage))
	}
	await(t, "the hog has all he can", func() bool { h.mu.Lock(); defer h.mu.Unlock(); return h.large["127.0.0.2"] == largeAtOnce/2 })
	c := newClient(u, patience/2, nil)
	defer c.close()
	if _, err := c.call(context.Background(), "healthcheck", strings.Repeat("x", 2*smallMessage)); err == nil || !strings.Contains(err.Error(), "-32602") {
		t.Errorf("got %v; want its fault", err)
	}
	await(t, "nothing of it is left", func() bool { h.mu.Lock(); defer h.mu.Unlock(); return len(h.large) == 1 })
}

// TestLargeResults: what many calls at once come to is limited, too.
func TestLargeResults(t *testing.T) {
	h := newHandler([]method{{"large", "string", "", func(request, []any) (any, error) { return strings.Repeat("&", maxMessage/20), nil }}})
	u := serve(t, h)
	c := newClient(u, patience, nil)
	defer c.close()
	calls := make([]any, 4)
	for i := range calls {
		calls[i] = map[string]any{"methodName": "large", "params": []any{}}
	}
	_, err := c.call(context.Background(), "system.multicall", calls)
	if f := (*fault)(nil); !errors.As(err, &f) || f.code != faultRequest {
		t.Errorf("got %v", err)
	}
	if v, err := c.call(context.Background(), "system.multicall", calls[:3]); err != nil || len(v.([]any)) != 3 {
		t.Errorf("got %v", err)
	}
}

// TestFewFiles: where the process may not have many files open, those that hold
// connections do not use them up.
func TestFewFiles(t *testing.T) {
	dir := t.TempDir()
	m := newRecorder(t)
	writeTree(t, dir, map[string]string{"sensors/s/check": printing(1), "client.cfg": "[monitor]\nurl = " + m.url.String() + "\n[agent]\nlisten = 127.0.0.1:0\n"})
	if hard := (syscall.Rlimit{}); syscall.Getrlimit(syscall.RLIMIT_NOFILE, &hard) != nil || hard.Max < 48 {
		t.Skip("no limit of files")
	}
	t.Setenv("PICKET_TEST_FILES", "48")
	_, c, lines := servingChild(t, dir)
	for i := 0; i < 3*maxConns; i++ {
		conn, err := net.Dial("tcp", c.url.Host)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	for i := 0; i < 10; i++ {
		mustCall(t, c, "cmd_submit_reading", i, "s")
		if got := receive(t, "reading", m.readings); got.value != "1" {
			t.Errorf("got %+v: %s", got, lines)
		}
	}
}

func TestIntrospection(t *testing.T) {
	h := newHandler([]method{{"m", "string int, string", "help", healthcheck}})
	call := func(name string, params ...any) string {
		v, err := h.call(request{}, name, params)
		return fmt.Sprintf("%v %v", v, err)
	}
	many := make([]any, maxCalls+1)
	tests := []struct{ got, want string }{
		{call("system.listMethods"), "[m system.getCapabilities system.listMethods system.methodHelp system.methodSignature system.multicall] <nil>"},
		{call("system.listMethods", 1), "<nil> fault -32602: .*"},
		{call("system.methodHelp", "m"), "help <nil>"},
		{call("system.methodHelp"), ".*fault -32602: .*"},
		{call("system.methodHelp", "x"), ".*fault -32602: no such method: \"x\""},
		{call("system.methodSignature", "m"), `\[\[string int\] \[string\]\] <nil>`},
		{call("system.methodSignature", 1), ".*fault -32602: .*"},
		{call("system.getCapabilities"), "map.*faults_interop.*20010516.*<nil>"},
		{call("system.multicall", []any{
			map[string]any{"methodName": "m", "params": []any{}},
			map[string]any{"methodName": "m"},
			map[string]any{"methodName": "x", "params": []any{}},
			map[string]any{"methodName": "system.multicall", "params": []any{[]any{}}},
			"m",
		}), `\[\[OK\] \[OK\] map\[faultCode:-32601 .*\] map\[faultCode:-32602 .*\] map\[faultCode:-32602 .*\]\] <nil>`},
		{call("system.multicall", many), "<nil> fault -32602: .*"},
		{call("system.multicall", 1), "<nil> fault -32602: .*"},
		{call("system.multicall"), "<nil> fault -32602: .*"},
	}
	for _, test := range tests {
		if !regexp.MustCompile("^("+test.want+")$").MatchString(test.got) && test.got != test.want {
			t.Errorf("got %s; want %s", test.got, test.want)
		}
	}
}

func TestClient(t *testing.T) {
	elsewhere := newRecorder(t)
	t.Setenv("HTTP_PROXY", elsewhere.url.String())
	t.Setenv("http_proxy", elsewhere.url.String())
	var last *http.Request
	answer := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			last = r
			w.Header().Set("Location", elsewhere.url.String())
			w.WriteHeader(status)
			io.WriteString(w, body)
		}
	}
	ok := string(encodeResponse("OK", nil))
	tests := []struct {
		handler http.HandlerFunc
		want    string
	}{
		{answer(200, ok), "OK <nil>"},
		{answer(200, string(encodeResponse(nil, faultf(7, "x")))), "<nil> fault 7: x"},
		{answer(302, ok), `<nil> HTTP "302 Found"`},
		{answer(307, ok), `<nil> HTTP "307 Temporary Redirect"`},
		{answer(500, ok), `<nil> HTTP "500 Internal Server Error"`},
		{answer(200, "<html>"), "<nil> <html> where <methodResponse> belongs"},
		{answer(200, ""), "<nil> .*not well-formed XML.*"},
		{answer(200, strings.Repeat(" ", maxMessage+1)), "<nil> answer longer than 524288 bytes"},
		{func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000")
			io.WriteString(w, ok)
		}, "<nil> .*EOF"},
		{func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, "<nil> .*EOF"},
	}
	for _, test := range tests {
		u := serve(t, test.handler)
		u.User = url.UserPassword("user", "secret")
		c := newClient(u, patience, nil)
		v, err := c.call(context.Background(), "m", 1)
		c.close()
		if got := fmt.Sprintf("%v %v", v, err); !regexp.MustCompile("^(?:"+test.want+")$").MatchString(got) || strings.Contains(got, "secret") {
			t.Errorf("got %s; want %s", got, test.want)
		}
	}
	if user, password, _ := last.BasicAuth(); user != "user" || password != "secret" {
		t.Errorf("got user %q, password %q", user, password)
	}
	if last.ContentLength <= 0 || len(last.TransferEncoding) > 0 || last.Header.Get("Content-Type") != "text/xml" {
		t.Errorf("got %v", last)
	}
	if n := elsewhere.tries.Load(); n != 0 {
		t.Errorf("%d redirects followed", n)
	}
}

// TestClientKeepsConnection: a burst goes over one connection, which does not
// stay open for long: it might be the only one that the monitor can serve.
func TestClientKeepsConnection(t *testing.T) {
	h := newHandler([]method{{"healthcheck", "string", "OK.", healthcheck}})
	peers := make(map[string]bool)
	c := newClient(serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		peers[r.RemoteAddr] = true
		h.ServeHTTP(w, r)
	})), patience, nil)
	defer c.close()
	for i := 0; i < 20; i++ {
		mustCall(t, c, "healthcheck")
	}
	if len(peers) > 3 { // one, but for a pause of the machine
		t.Errorf("%d connections; want 1", len(peers))
	}
	h = newHandler([]method{{"healthcheck", "string", "OK.", healthcheck}})
	c = newClient(serve(t, h), patience, nil)
	mustCall(t, c, "healthcheck")
	await(t, "the connection is closed", func() bool { h.mu.Lock(); defer h.mu.Unlock(); return len(h.conns) == 0 })
}

// TestClientWire: what a monitor may answer, byte for byte, and what becomes of
// the connection.
func TestClientWire(t *testing.T) {
	body := func(v any) string { return string(encodeResponse(v, nil)) }
	sized := func(v any) string {
		return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body(v)), body(v))
	}
	chunked := func(v any) string {
		return fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body(v)), body(v))
	}
	tests := []struct {
		name    string
		answers []string // to the requests of each connection; "" closes it
		ends    bool     // it is closed after each
		want    []string
		conns   int
	}{
		{"kept", []string{sized("a"), sized("b")}, false, []string{"a", "b"}, 1},
		{"chunked", []string{chunked("a"), sized("b")}, false, []string{"a", "b"}, 1},
		{"continued", []string{"HTTP/1.1 100 Continue\r\n\r\n" + sized("a"), sized("b")}, false, []string{"a", "b"}, 1},
		{"until it ends", []string{"HTTP/1.0 200 OK\r\n\r\n" + body("a")}, true, []string{"a", "a"}, 2},
		{"to be closed", []string{strings.Replace(sized("a"), "\r\n", "\r\nConnection: close\r\n", 1)}, false, []string{"a", "a"}, 2},
		{"closed without a word", []string{sized("a")}, true, []string{"a", "a"}, 2},
		{"closed at the next request", []string{sized("a"), ""}, false, []string{"a", "a"}, 2},
		{"more than was asked", []string{sized("a") + sized("b"), sized("c")}, false, []string{"a", "a"}, 2},
		{"a fault", []string{strings.Replace(sized("a"), "200 OK", "500 Oops", 1), sized("b")}, false, []string{`HTTP "500 Oops"`, `HTTP "500 Oops"`}, 2},
		{"an endless header", []string{"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2*maxHeader)}, false, []string{"a header of more than 8192 bytes", "a header of more than 8192 bytes"}, 2},
		{"endless informational answers", []string{strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 1000)}, false, []string{"a header of more than 8192 bytes", "a header of more than 8192 bytes"}, 2},
		{"half a header", []string{"HTTP/1.1 200 OK\r\nCont"}, false, []string{".*i/o timeout"}, 1},
		{"no HTTP", []string{"SSH-2.0-OpenSSH_9.6\r\n"}, true, []string{`malformed HTTP .*`, `malformed HTTP .*`}, 2},
	}
	for _, test := range tests {
		test := test
		t.Run(test.name, func(t *testing.T) {
			l := listenRaw(t, func(conn net.Conn) {
				r := bufio.NewReader(conn)
				for _, answer := range test.answers {
					request, err := http.ReadRequest(r)
					if err != nil || answer == "" {
						return
					}
					if _, err := io.Copy(io.Discard, request.Body); err != nil {
						return
					}
					if _, err := io.WriteString(conn, answer); err != nil || test.ends {
						return
					}
				}
				io.Copy(io.Discard, r) // until the client hangs up
			})
			defer l.close()
			c := newClient(&url.URL{Scheme: "http", Host: l.Addr().String()}, patience, nil)
			c.idle = patience
			if test.name == "half a header" {
				c.timeout = time.Second / 2
			}
			defer c.close()
			for _, want := range test.want {
				v, err := c.call(context.Background(), "m")
				got := fmt.Sprint(v)
				if err != nil {
					got = err.Error()
				}
				if !regexp.MustCompile("^" + want + "$").MatchString(got) {
					t.Errorf("got %s; want %s", got, want)
				}
			}
			if n := int(l.conns.Load()); n != test.conns {
				t.Errorf("%d connections; want %d", n, test.conns)
			}
		})
	}
}

// TestClientTLSWire: over TLS, too, a connection is kept, but not where the
// monitor has said more than it was asked, all of it in one segment.
func TestClientTLSWire(t *testing.T) {
	for _, more := range []bool{false, true} {
		files := newCA(t, "ca").files(t, "monitor", time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
		l := listenRaw(t, func(raw net.Conn) {
			segment := &heldConn{Conn: raw}
			conn := tls.Server(segment, serverTLS(files))
			for r := bufio.NewReader(conn); ; {
				request, err := http.ReadRequest(r)
				if err != nil {
					return
				}
				io.Copy(io.Discard, request.Body)
				segment.hold = true
				for answer := 0; answer == 0 || answer == 1 && more; answer++ {
					body := encodeResponse(answer, nil)
					fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
				}
				segment.release()
			}
		})
		c := newClient(&url.URL{Scheme: "https", Host: l.Addr().String()}, patience, clientTLS(files))
		c.idle = patience
		for i := 0; i < 3; i++ {
			if v, err := c.call(context.Background(), "m"); v != 0 || err != nil {
				t.Errorf("more %v: got %v, %v", more, v, err)
			}
		}
		c.close()
		l.close()
		if n := l.conns.Load(); more && n != 3 || !more && n != 1 {
			t.Errorf("more %v: %d connections", more, n)
		}
	}
}

// A rawListener counts its connections.
type rawListener struct {
	net.Listener
	conns  atomic.Int32
	served sync.WaitGroup
}

// listenRaw serves each connection with a function, and closes it after that.
func listenRaw(t *testing.T, serve func(net.Conn)) *rawListener {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &rawListener{Listener: inner}
	l.served.Add(1)
	go func() {
		defer l.served.Done()
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			l.conns.Add(1)
			l.served.Add(1)
			go func() {
				defer l.served.Done()
				defer conn.Close()
				serve(conn)
			}()
		}
	}()
	return l
}

// close waits until nothing is served any more.
func (l *rawListener) close() {
	l.Close()
	l.served.Wait()
}

// A heldConn can hold back what is written to it, to write it in one go.
type heldConn struct {
	net.Conn
	hold bool
	held []byte
}

func (h *heldConn) Write(p []byte) (int, error) {
	if !h.hold {
		return h.Conn.Write(p)
	}
	h.held = append(h.held, p...)
	return len(p), nil
}

func (h *heldConn) release() {
	h.Conn.Write(h.held)
	h.hold, h.held = false, nil
}

// TestClientCancelled: what was cancelled before is not sent; what was cancelled
// when all had come is there.
func TestClientCancelled(t *testing.T) {
	m := newRecorder(t)
	c := newClient(m.url, patience, nil)
	c.idle = patience
	defer c.close()
	mustCall(t, c, "healthcheck")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for i := 0; i < 20; i++ {
		if _, err := c.call(ctx, "cmd_store_probe_data", i, []any{0, "1"}, dateTime("20261122T20:43:21")); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	}
	ctx, cancel = context.WithCancel(context.Background())
	defer cancel()
	err := c.post(ctx, "healthcheck", nil, func(_ *link, body io.Reader) error {
		v, err := readResponse(body)
		if v != "OK" {
			t.Errorf("got %v", v)
		}
		cancel()
		return err
	})
	if err != nil {
		t.Error(err)
	}
	mustCall(t, c, "healthcheck")
	if n := len(m.readings); n != 0 {
		t.Errorf("%d sent", n)
	}
}

func TestClientHead(t *testing.T) {
	for u, want := range map[string]string{
		"http://monitor":                       "POST / HTTP/1.1\r\nHost: monitor\r\n",
		"http://monitor:/a%20b?c=d#e":          "POST /a%20b?c=d HTTP/1.1\r\nHost: monitor\r\n",
		"http://[fe80::1%25eth0]:8081/xmlrpc/": "POST /xmlrpc/ HTTP/1.1\r\nHost: [fe80::1]:8081\r\n",
		"http://a%25b/":                        "POST / HTTP/1.1\r\nHost: a%b\r\n",
	} {
		parsed, err := httpURL(u)
		if err != nil {
			t.Fatal(err)
		}
		if head := newClient(parsed, patience, nil).head; !strings.HasPrefix(head, want) {
			t.Errorf("%s: got %q", u, head)
		}
	}
}

// testDelivery delivers to a recorder with waits of milliseconds.
func testDelivery(t *testing.T, m *recorder) *delivery {
	d := newDelivery(newClient(m.url, patience, nil), time.UTC, "nan", time.Millisecond, nil)
	t.Cleanup(func() { within(patience, d.close) })
	return d
}

func TestDelivery(t *testing.T) {
	m := newRecorder(t)
	d := testDelivery(t, m)
	d.put(7, reading{code: 0, value: "0.420", taken: time.Now().Add(-time.Hour)})
	got := receive(t, "reading", m.readings)
	at, err := time.Parse(dateTimeLayout, string(got.time))
	if age := time.Since(at); err != nil || age < 59*time.Minute || age > 61*time.Minute {
		t.Errorf("got time %s, %v; want an hour ago", got.time, err)
	}
	got.time = ""
	if want := (stored{"", "127.0.0.1", 7, 0, "0.420"}); got != want {
		t.Errorf("got %+v; want %+v", got, want)
	}
	d.noValue = "0"
	d.put("t", reading{code: 3, taken: time.Now()})
	if got := receive(t, "reading", m.readings); got.ticket != any("t") || got.code != 3 || got.value != "0" {
		t.Errorf("got %+v", got)
	}
	d.put(int64(8), reading{taken: time.Now()})
	if got := receive(t, "reading", m.readings); got.ticket != any(int64(8)) {
		t.Errorf("got %+v", got)
	}
}

// TestDeliveryClock: where the clock was set after the reading was taken, the
// time that is sent is the corrected one.
func TestDeliveryClock(t *testing.T) {
	m := newRecorder(t)
	d := testDelivery(t, m)
	d.clock = func(now time.Time) time.Time { return now.AddDate(56, 0, 0) } // for the box it was 1970 before
	d.put(7, reading{taken: time.Now().Add(-time.Hour)})
	at, err := time.Parse(dateTimeLayout, string(receive(t, "reading", m.readings).time))
	if off := at.Sub(time.Now().UTC().AddDate(56, 0, 0).Add(-time.Hour)); err != nil || off < -time.Minute || off > time.Minute {
		t.Errorf("got %v, %v off; want an hour before the new time", at, off)
	}
}

// TestDeliveryAway: whatever a monitor does that is no answer, a reading is
// kept and tried again; the others come after it, oldest first.
func TestDeliveryAway(t *testing.T) {
	lines := logged(t)
	m := newRecorder(t)
	kept := make(chan struct{})
	m.set(func(w http.ResponseWriter, try int) bool {
		switch try {
		case 1:
			<-kept
			w.WriteHeader(503)
		case 2:
			io.WriteString(w, "<html>")
		case 3:
			w.WriteHeader(404)
		case 4:
			panic(http.ErrAbortHandler)
		}
		return try <= 4
	})
	d := testDelivery(t, m)
	for i := 1; i <= 10; i++ {
		d.put(i, reading{taken: time.Now()})
	}
	close(kept)
	var got []int
	for range [10]int{} {
		got = append(got, receive(t, "reading", m.readings).ticket.(int))
	}
	if got[0] == 10 { // an attempt with the newest found the monitor back
		got = append(got[1:], 10)
	}
	if want := []int{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}; !slices.Equal(got, want) {
		t.Errorf("got %v; want %v", got, want)
	}
	await(t, "two lines", func() bool { return strings.Count(lines.String(), "\n") == 2 })
	if !regexp.MustCompile(`^monitor http://127.0.0.1:[0-9]+/xmlrpc/: away: HTTP "503 Service Unavailable"\nmonitor .*: back after [0-9]+s, 10 readings delivered\n$`).MatchString(lines.String()) {
		t.Errorf("got %s", lines)
	}
}

// TestDeliveryChokes: a reading on which the monitor always fails does not
// hold up the others.
func TestDeliveryChokes(t *testing.T) {
	inner := newRecorder(t)
	handler := newHandler((&monitor{stored: func(s stored) error { inner.readings <- s; return nil }}).methods())
	u := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if bytes.Contains(body, []byte("poison")) {
			w.WriteHeader(500)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		handler.ServeHTTP(w, r)
	}))
	d := testDelivery(t, &recorder{url: u})
	d.put("poison", reading{taken: time.Now()})
	for i := 1; i <= 20; i++ {
		d.put(i, reading{taken: time.Now()})
	}
	for range [20]int{} {
		receive(t, "reading", inner.readings)
	}
	d.discard("poison")
}

// TestDeliveryFault: three faults drop a reading; fewer do not.
func TestDeliveryFault(t *testing.T) {
	lines := logged(t)
	m := newRecorder(t)
	refuse := func(w http.ResponseWriter) { w.Write(encodeResponse(nil, faultf(1, "unknown ticket"))) }
	m.set(func(w http.ResponseWriter, try int) bool {
		if try <= 5 {
			refuse(w)
		}
		return try <= 5
	})
	d := testDelivery(t, m)
	d.put(1, reading{taken: time.Now()})
	await(t, "dropped", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return len(d.kept) == 0 })
	d.put(2, reading{taken: time.Now()})
	if got := receive(t, "reading", m.readings); got.ticket != any(2) || m.tries.Load() != 6 {
		t.Errorf("got %+v after %d tries; want ticket 2 after 6", got, m.tries.Load())
	}
	if want := `^ticket 1: reading dropped: monitor .*: fault 1: unknown ticket\n$`; !regexp.MustCompile(want).MatchString(lines.String()) {
		t.Errorf("got %s", lines)
	}
}

// TestDeliveryFaultSpread: the three tries are spread out.
func TestDeliveryFaultSpread(t *testing.T) {
	d := newDelivery(newClient(newRecorder(t).url, patience, nil), time.UTC, "nan", time.Second, nil)
	within(patience, d.close)
	u := &undelivered{}
	for _, want := range []time.Duration{10 * time.Second, 20 * time.Second} {
		d.settle(u, d.client, faultf(1, "locked"))
		if wait := time.Until(u.notBefore); wait < want/2-time.Second || wait > want*3/2 {
			t.Errorf("got %v; want %v ±50 %%", wait, want)
		}
	}
}

// TestDeliverySlow: a monitor that is slower than the sensors makes them wait;
// nothing is dropped.
func TestDeliverySlow(t *testing.T) {
	m := newRecorder(t)
	hold := make(chan struct{})
	m.set(func(http.ResponseWriter, int) bool { <-hold; return false })
	d := testDelivery(t, m)
	put := make(chan int, 2*maxKept)
	go func() {
		for i := 0; i < 2*maxKept; i++ {
			d.waitRoom(context.Background())
			d.put(i, reading{taken: time.Now()})
			put <- i
		}
	}()
	await(t, "there is no more room", func() bool { return len(put) == maxKept-roomForRuns })
	close(hold)
	for i := 0; i < 2*maxKept; i++ {
		if got := receive(t, "reading", m.readings); got.ticket != any(i) {
			t.Fatalf("got %+v; want ticket %d", got, i)
		}
	}
}

// A faultyProxy stands between a delivery and its monitor: the next
// connections carry so many bytes in all, requests and answers together, and
// then end in one way or another.
type faultyProxy struct {
	to     string
	relays sync.WaitGroup

	mu       sync.Mutex // guards what is below
	listener net.Listener
	tries    int    // connections that came
	faulty   int    // of those to come, so many fail
	carry    int    // bytes of one that fails
	then     string // reset, finish, or hold: nothing is passed on any more
	latest   *faultyLink
	closed   bool
	open     map[net.Conn]bool
}

// newFaultyProxy returns a proxy that is there until the test ends.
func newFaultyProxy(t *testing.T, to string) *faultyProxy {
	p := &faultyProxy{to: to, open: make(map[net.Conn]bool)}
	p.listen(t, "127.0.0.1:0")
	t.Cleanup(func() {
		p.listener.Close()
		p.mu.Lock()
		p.closed = true
		for c := range p.open {
			c.Close()
		}
		p.mu.Unlock()
		p.relays.Wait()
	})
	return p
}

func (p *faultyProxy) listen(t *testing.T, address string) {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	p.listener = listener
	p.relays.Add(1)
	go func() {
		defer p.relays.Done()
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			p.relay(near)
		}
	}()
}

// fail has the next connections fail, and counts from here on.
func (p *faultyProxy) fail(connections, carry int, then string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tries, p.faulty, p.carry, p.then = 0, connections, carry, then
}

func (p *faultyProxy) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tries
}

// latestBytes counts what the latest connection carried.
func (p *faultyProxy) latestBytes() (request, all int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.latest.mu.Lock()
	defer p.latest.mu.Unlock()
	return p.latest.request, p.latest.all
}

// relay passes on what comes on a connection, and what is answered.
func (p *faultyProxy) relay(near net.Conn) {
	far, err := net.Dial("tcp", p.to)
	if err != nil {
		near.Close()
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tries++
	l := &faultyLink{near: near.(*net.TCPConn), far: far.(*net.TCPConn), left: 1 << 30}
	if p.tries <= p.faulty {
		l.left, l.then = p.carry, p.then
	}
	p.open[near], p.open[far] = true, true
	p.latest = l
	if p.closed || l.carry(far, nil) {
		l.end()
	}
	p.relays.Add(2)
	pass := func(to, from net.Conn) {
		defer p.relays.Done()
		l.pass(to, from)
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.open, from)
	}
	go pass(far, near)
	go pass(near, far)
}

// A faultyLink is one connection through a faultyProxy.
type faultyLink struct {
	near, far *net.TCPConn
	then      string

	mu           sync.Mutex // guards what is below
	left         int        // bytes that are still passed on
	request, all int        // bytes that were
}

// pass passes on as much as it may.
func (l *faultyLink) pass(to, from net.Conn) {
	defer l.end()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if l.carry(to, buffer[:n]) || err != nil {
			return
		}
	}
}

// carry passes bytes on and reports whether it was the end.
func (l *faultyLink) carry(to net.Conn, data []byte) (over bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	data = data[:min(len(data), l.left)]
	to.Write(data) // a side that has gone is noticed where it is read
	l.left -= len(data)
	l.all += len(data)
	if to == net.Conn(l.far) {
		l.request += len(data)
	}
	return l.left == 0 && l.then != "hold"
}

// end closes both sides.
func (l *faultyLink) end() {
	if l.then == "reset" {
		l.near.SetLinger(0)
		l.far.SetLinger(0)
	}
	l.near.Close()
	l.far.Close()
}

// emptied waits until a delivery has nothing left, and leaves no connection.
func emptied(t *testing.T, what string, d *delivery) {
	t.Helper()
	await(t, what, func() bool { n, _ := d.count(); return n == 0 })
	d.monitor().close()
}

// proxiedDelivery delivers to a recorder through a proxy.
func proxiedDelivery(t *testing.T, timeout time.Duration) (*recorder, *faultyProxy, *delivery) {
	m := newRecorder(t)
	p := newFaultyProxy(t, m.url.Host)
	u := *m.url
	u.Host = p.listener.Addr().String()
	d := newDelivery(newClient(&u, timeout, nil), time.UTC, "nan", time.Millisecond, nil)
	t.Cleanup(func() { within(patience, d.close) })
	return m, p, d
}

// TestNetworkFaults: whatever happens on the way to the monitor, or in it, a
// reading that it has not answered is tried again until it is stored: once, or
// twice where the answer was lost; three faults are an answer.
func TestNetworkFaults(t *testing.T) {
	logged(t)
	m, p, d := proxiedDelivery(t, patience)
	sample := reading{value: "0.42", taken: time.Now()}
	d.put("00000", sample)
	emptied(t, "an exchange", d)
	request, all := p.latestBytes()
	t.Run("refused", func(t *testing.T) { testRefused(t, sample) })
	t.Run("reset", func(t *testing.T) { testResets(t, m, p, d, sample, request, all) })
	t.Run("update and move", testResetChanges)

	status := func(code int) func(w http.ResponseWriter) {
		return func(w http.ResponseWriter) {
			w.Header().Set("Location", "/xmlrpc/")
			w.WriteHeader(code)
		}
	}
	text := func(text string) func(w http.ResponseWriter) {
		return func(w http.ResponseWriter) { io.WriteString(w, text) }
	}
	unknown := text(string(encodeResponse(nil, faultf(1, "unknown ticket"))))
	tests := []struct {
		name         string
		times        int // so many tries meet it
		answer       func(w http.ResponseWriter)
		carry        int // without an answer: bytes that get through
		then         string
		tries, least int
		most         int // stored
	}{
		{name: "stalled at once", times: 1, then: "hold", tries: 2, least: 1, most: 1},
		{name: "stalled in the request", times: 1, carry: request / 2, then: "hold", tries: 2, least: 1, most: 1},
		{name: "answer after the time-out", times: 1, carry: request, then: "hold", tries: 2, least: 1, most: 2},
		{name: "stalled in the answer", times: 1, carry: all - 1, then: "hold", tries: 2, least: 1, most: 2},
		{name: "closed at once", times: 5, then: "finish", tries: 6, least: 1, most: 1},
		{name: "closed before the answer", times: 2, carry: request, then: "finish", tries: 3, least: 1, most: 3},
		{name: "truncated answer", times: 1, carry: all - 10, then: "finish", tries: 2, least: 1, most: 2},
		{name: "truncated header", times: 1, carry: request + 20, then: "finish", tries: 2, least: 1, most: 2},
		{name: "HTTP 500", times: 3, answer: status(500), tries: 4, least: 1, most: 1},
		{name: "HTTP 503", times: 3, answer: status(503), tries: 4, least: 1, most: 1},
		{name: "HTTP 302", times: 3, answer: status(302), tries: 4, least: 1, most: 1},
		{name: "HTTP 307", times: 3, answer: status(307), tries: 4, least: 1, most: 1},
		{name: "HTTP 404", times: 3, answer: status(404), tries: 4, least: 1, most: 1},
		{name: "HTTP 401", times: 3, answer: status(401), tries: 4, least: 1, most: 1},
		{name: "HTML", times: 3, answer: text("<html><body>Please log in</body></html>"), tries: 4, least: 1, most: 1},
		{name: "nothing", times: 3, answer: text(""), tries: 4, least: 1, most: 1},
		{name: "a call", times: 3, answer: text(string(encodeCall("healthcheck"))), tries: 4, least: 1, most: 1},
		{name: "endless answer", times: 2, answer: func(w http.ResponseWriter) {
			for err := error(nil); err == nil; {
				_, err = io.WriteString(w, strings.Repeat(" ", 32<<10))
			}
		}, tries: 3, least: 1, most: 1},
		{name: "a fault", times: 1, answer: unknown, tries: 2, least: 1, most: 1},
		{name: "two faults", times: 2, answer: unknown, tries: 3, least: 1, most: 1},
		{name: "three faults", times: 3, answer: unknown, tries: 3},
	}
	for _, test := range tests {
		test := test
		t.Run(test.name, func(t *testing.T) {
			timeout := patience
			if test.then == "hold" {
				t.Parallel()
				timeout = 3 * time.Second // what is good takes far less
			}
			m, p, d := proxiedDelivery(t, timeout)
			tries := func() int { return int(m.tries.Load()) }
			if test.answer == nil {
				p.fail(test.times, test.carry, test.then)
				tries = p.count
			} else {
				m.set(func(w http.ResponseWriter, try int) bool {
					if try <= test.times {
						test.answer(w)
					}
					return try <= test.times
				})
			}
			d.put("00001", sample)
			emptied(t, "tried", d)
			if got := tries(); got != test.tries {
				t.Errorf("got %d tries; want %d", got, test.tries)
			}
			d.put("00002", sample)
			emptied(t, "the next reading", d)
			stored := storedTickets(m)
			if n := stored["00001"]; n < test.least || n > test.most || stored["00002"] != 1 {
				t.Errorf("got %v; want the first %d to %d times, the second once", stored, test.least, test.most)
			}
			t.Logf("%s, %s: %s, stored %s", test.name, plural(test.times, "time"), plural(test.tries, "attempt"), plural(stored["00001"], "time"))
			total("network faults survived", test.times)
		})
	}
}

// storedTickets counts how often a recorder got each ticket.
func storedTickets(m *recorder) map[any]int {
	stored := make(map[any]int)
	for len(m.readings) > 0 {
		stored[(<-m.readings).ticket]++
	}
	return stored
}

// testRefused: nobody listens for three attempts.
func testRefused(t *testing.T, sample reading) {
	m, p, d := proxiedDelivery(t, patience)
	address := p.listener.Addr().String()
	p.listener.Close()
	d.put("00001", sample)
	await(t, "three attempts", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return d.missed >= 3 })
	p.listen(t, address)
	emptied(t, "delivered", d)
	if stored := storedTickets(m); stored["00001"] != 1 || p.count() != 1 {
		t.Errorf("got %v in %d tries; want it stored once, at the first that came through", stored, p.count())
	}
}

// testResetChanges: an update or a move whose connection is reset, wherever that
// is, has either been made or has changed nothing, and its ticket says which.
func testResetChanges(t *testing.T) {
	dir := t.TempDir()
	m, readings := &monitor{packages: filepath.Join(dir, "packages")}, make(chan stored, 100)
	m.stored = func(s stored) error { readings <- s; return nil }
	archive := packageOf(t, entry("demo/", ""), entry("demo/check", printing(2)))
	writeTree(t, dir, map[string]string{"packages/demo.tar.bz2": string(archive), "sensors/demo/check": printing(1)})
	next := serve(t, newHandler(m.methods()))
	p := newFaultyProxy(t, next.Host)
	u := &url.URL{Scheme: "http", Host: p.listener.Addr().String(), Path: "/xmlrpc/"}
	m.next = next.String()
	config := "[monitor]\nurl = " + u.String() + "\n"
	writeTree(t, dir, map[string]string{"client.cfg": config})
	s := testSettings(t, filepath.Join(dir, "sensors"), u)
	s.backup, s.file = filepath.Join(dir, "backup"), filepath.Join(dir, "client.cfg")
	a, c := startAgent(t, s)
	a.delivery.mu.Lock()
	a.delivery.retry = time.Millisecond
	a.delivery.mu.Unlock()
	ticket := 0
	try := func(carry int, method string, params ...any) (code int) {
		t.Helper()
		a.delivery.monitor().close() // so that it comes on a connection that fails
		p.fail(1, carry, "reset")
		ticket++
		mustCall(t, c, method, append(params, ticket)...)
		got := receive(t, "outcome", readings)
		await(t, "it is known to be stored", func() bool { n, _ := a.delivery.count(); return n == 0 })
		for len(readings) > 0 { // the last byte of an answer may come, or not
			<-readings
		}
		if got.ticket != any(ticket) {
			t.Errorf("got %+v; want ticket %d", got, ticket)
		}
		return got.code
	}
	before, failed := readTree(t, s.path), 0
	for n := 0; try(n, "cmd_update_sensor_code", "demo") != 0; n += 101 {
		failed++
		if after := readTree(t, s.path); !reflect.DeepEqual(after, before) {
			t.Fatalf("reset after %d bytes: got %q", n, after)
		}
	}
	if text := readTree(t, s.path)["demo/check"]; text != printing(2) || failed < len(archive)/101 {
		t.Errorf("got %q after %d", text, failed)
	}
	moved := func(to *url.URL) {
		t.Helper()
		text, err := os.ReadFile(s.file)
		if want := "[monitor]\nurl = " + to.String() + "\n"; err != nil || string(text) != want {
			t.Errorf("got %q, %v; want %q", text, err, want)
		}
	}
	for n := 0; try(n, "cmd_register_new_server") != 0; n += 11 {
		failed++
		moved(u)
	}
	moved(next)
	if left := leftovers(t, dir, s.path, s.backup); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	total("network faults survived", failed)
	t.Logf("%d updates and moves failed, and changed nothing", failed)
}

// testResets: the connection is reset after each number of bytes that an
// exchange can have.
func testResets(t *testing.T, m *recorder, p *faultyProxy, d *delivery, sample reading, request, all int) {
	ticket := func(n int) string { return fmt.Sprintf("%05d", n+1) }
	for n := 0; n <= all; n++ {
		p.fail(1, n, "reset")
		d.put(ticket(n), sample)
		emptied(t, ticket(n), d)
		if got := p.count(); got != 2 && (n < all || got != 1) { // the last byte may come before the reset
			t.Errorf("reset after %d bytes of %d + %d: got %d tries; want 2", n, request, all-request, got)
		}
	}
	stored, twice := storedTickets(m), 0
	for n := 0; n <= all; n++ {
		got := stored[ticket(n)]
		if got < 1 || got > 2 || n < request && got != 1 {
			t.Errorf("reset after %d bytes of %d + %d: stored %d times", n, request, all-request, got)
		}
		twice += got - 1
	}
	total("network faults survived", all+1)
	t.Logf("%d exchanges of %d + %d bytes; %d readings were stored twice", all+1, request, all-request, twice)
}

// TestDeliveryDiscard: a ticket that was given away again takes the
// undelivered reading with it, also the one that is just being sent.
func TestDeliveryDiscard(t *testing.T) {
	m := newRecorder(t)
	sending, answer := make(chan int, 10), make(chan bool)
	m.set(func(w http.ResponseWriter, try int) bool {
		sending <- try
		if fail := <-answer; fail {
			w.WriteHeader(500)
			return true
		}
		return false
	})
	d := testDelivery(t, m)
	d.put(1, reading{value: "1", taken: time.Now()})
	receive(t, "sending", sending)
	d.put(2, reading{value: "2", taken: time.Now()})
	d.discard(1)
	d.discard(2)
	d.put(1, reading{value: "3", taken: time.Now()})
	d.put(2, reading{value: "4", taken: time.Now()})
	answer <- true
	for range [2]int{} {
		receive(t, "sending", sending)
		answer <- false
	}
	if a, b := receive(t, "reading", m.readings), receive(t, "reading", m.readings); a.value != "3" || b.value != "4" {
		t.Errorf("got %+v, %+v", a, b)
	}
}

func TestDeliveryFull(t *testing.T) {
	m := newRecorder(t)
	sending, hold := make(chan struct{}, 1), make(chan struct{})
	m.set(func(w http.ResponseWriter, try int) bool {
		if try == 1 {
			sending <- struct{}{}
			<-hold
		}
		return false
	})
	d := testDelivery(t, m)
	d.put(1, reading{taken: time.Now()})
	receive(t, "sending", sending)
	for i := 2; i <= 2*maxKept+10; i++ {
		d.put(i, reading{taken: time.Now()})
	}
	close(hold)
	if got := receive(t, "reading", m.readings); got.ticket != any(1) {
		t.Errorf("got %+v; want the one that was being sent", got)
	}
	for i := 12; i <= 2*maxKept+10; i++ {
		if got := receive(t, "reading", m.readings); got.ticket != any(i) {
			t.Fatalf("got %+v; want ticket %d", got, i)
		}
	}
}

// TestDeliveryClose: what can be delivered is, although the monitor fails or
// hangs at some readings, and a dead monitor does not hold up the end.
func TestDeliveryClose(t *testing.T) {
	for name, misbehave := range map[string]func(w http.ResponseWriter, hold chan struct{}){
		"fails": func(w http.ResponseWriter, _ chan struct{}) { w.WriteHeader(500) },
		"hangs": func(_ http.ResponseWriter, hold chan struct{}) { <-hold },
	} {
		m, hold, misbehave := newRecorder(t), make(chan struct{}), misbehave
		m.set(func(w http.ResponseWriter, try int) bool {
			if bad := try == 1 || try == 3; bad {
				misbehave(w, hold)
				return true
			}
			return false
		})
		d := newDelivery(newClient(m.url, patience, nil), time.UTC, "nan", time.Hour, nil)
		for i := 0; i < 10; i++ {
			d.put(i, reading{taken: time.Now()})
		}
		await(t, "an attempt", func() bool { return m.tries.Load() == 1 })
		within(patience, d.close)
		close(hold)
		if n := len(m.readings); n < 9 { // the one that failed after close began is not tried again
			t.Errorf("%s: %d readings delivered of 10", name, n)
		}
	}

	silent, hold := newRecorder(t), make(chan struct{})
	defer close(hold)
	silent.set(func(http.ResponseWriter, int) bool { <-hold; return true })
	d := newDelivery(newClient(silent.url, patience, nil), time.UTC, "nan", time.Hour, nil)
	d.put(1, reading{taken: time.Now()})
	await(t, "an attempt", func() bool { return silent.tries.Load() == 1 })
	lines := logged(t)
	within(0, d.close)
	if !strings.Contains(lines.String(), "1 reading not delivered") {
		t.Errorf("got %s", lines)
	}
}

// TestAccess: who may call, by address.
func TestAccess(t *testing.T) {
	allow, err := networks("192.168.1.7/24, 10.0.0.5,fd00::/8, ::ffff:172.16.0.0/108, 2001:db8::1")
	if err != nil {
		t.Fatal(err)
	}
	a := &access{allow: allow}
	for host, want := range map[string]bool{
		"192.168.1.1": true, "192.168.2.1": false, "::ffff:192.168.1.9": true, "10.0.0.5": true, "10.0.0.6": false,
		"fd12::1": true, "fe80::1%eth0": false, "172.16.3.4": true, "172.32.0.1": false, "2001:db8::1": true, "2001:db8::2": false, "": false,
	} {
		if got := a.allows(host); got != want {
			t.Errorf("%s: got %v; want %v", host, got, want)
		}
	}
	for _, bad := range []string{"x", "1.2.3.4/33", "1.2.3.4,,5.6.7.8", ",", "host.example", "fe80::1%eth0", "::ffff:1.2.3.4/90"} {
		if got, err := networks(bad); err == nil {
			t.Errorf("%q: got %v", bad, got)
		}
	}
	if got := neighbours("::ffff:1.2.3.4") + " " + neighbours("2001:db8::1:2:3:4"); got != "1.2.3.4 2001:db8::/64" {
		t.Errorf("got %s", got)
	}
}

// TestForbidden: others get 403, and their body is not waited for.
func TestForbidden(t *testing.T) {
	h := newHandler([]method{{"healthcheck", "string", "OK.", healthcheck}})
	u := serve(t, h)
	allow, _ := networks("127.0.0.1")
	h.setAccess(&access{allow: allow})
	c := newClient(u, patience, nil)
	defer c.close()
	mustCall(t, c, "healthcheck")
	conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "POST /xmlrpc HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\n\r\n")
	conn.SetReadDeadline(time.Now().Add(patience))
	answer, _ := io.ReadAll(conn)
	if !strings.HasPrefix(string(answer), "HTTP/1.1 403 ") {
		t.Errorf("got %q", answer)
	}
	if n := h.count.Load(); n != 1 {
		t.Errorf("%d refused; want 1", n)
	}
}

// TestHog: one that opens connections all the time, and calls that wait on each,
// does not keep out who calls from elsewhere, and holds no more than 64.
func TestHog(t *testing.T) {
	wait := make(chan struct{})
	var waiting atomic.Int64
	h := newHandler([]method{
		{"healthcheck", "string", "OK.", healthcheck},
		{"wait", "string", "", func(r request, _ []any) (any, error) {
			waiting.Add(1)
			defer waiting.Add(-1)
			select {
			case <-wait:
			case <-r.ctx.Done():
			}
			return "OK", nil
		}},
	})
	u := serve(t, h)
	defer close(wait)
	hog := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	body := encodeCall("wait")
	stop := make(chan struct{})
	opened := make(chan int)
	var conns []net.Conn
	go func() {
		n := 0
		for ; n < 2000; n++ {
			conn, err := hog.Dial("tcp", u.Host)
			if err != nil {
				break
			}
			conns = append(conns, conn)
			switch n % 3 {
			case 0:
				fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			case 1:
				io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nX-")
			}
			select {
			case <-stop:
				opened <- n
				return
			default:
			}
		}
		opened <- n
	}()
	for i := 0; i < 100; i++ {
		c := newClient(u, patience, nil) // a fresh connection for each
		mustCall(t, c, "healthcheck")
		c.close()
	}
	close(stop)
	t.Logf("%d connections of a hog beside 100 calls", receive(t, "the hog", opened))
	await(t, "no more than the limit", func() bool { h.mu.Lock(); defer h.mu.Unlock(); return len(h.conns) <= maxConns })
	await(t, "no more calls than connections", func() bool { return waiting.Load() <= maxConns })
	for _, conn := range conns {
		conn.Close()
	}
}

// TestDeliveryTurns: behind an outage fresh readings do not wait for the end of
// the backlog.
func TestDeliveryTurns(t *testing.T) {
	m := newRecorder(t)
	held, hold := make(chan struct{}, 1000), make(chan bool)
	m.set(func(w http.ResponseWriter, try int) bool {
		held <- struct{}{}
		if away := <-hold; away {
			w.WriteHeader(503)
			return true
		}
		return false
	})
	d := testDelivery(t, m)
	for i := 1; i <= 100; i++ {
		d.put(i, reading{taken: time.Now()})
	}
	receive(t, "an attempt", held)
	hold <- true
	receive(t, "another", held)
	hold <- false // the monitor is back
	receive(t, "a third", held)
	for i := 1001; i <= 1010; i++ {
		d.put(i, reading{taken: time.Now()})
	}
	m.set(nil)
	hold <- false
	fresh := 0
	for i := 0; i < 30; i++ {
		if receive(t, "reading", m.readings).ticket.(int) > 1000 {
			fresh++
		}
	}
	if fresh != 10 {
		t.Errorf("%d fresh ones among the first 30; want 10", fresh)
	}
}

// spoolDelivery delivers to a recorder with waits of milliseconds and a spool.
func spoolDelivery(t *testing.T, m *recorder, dir string, limit int64) *delivery {
	d := newDelivery(newClient(m.url, patience, nil), time.UTC, "nan", time.Millisecond, newSpool(dir, limit))
	t.Cleanup(func() { within(patience, d.close) })
	return d
}

// spooled reads what a spool holds undelivered, as ticket=value.
func spooled(t *testing.T, dir string) (list []string) {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, "readings"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := readSpool(f, instantOf(func(now time.Time) time.Time { return now }))
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range c.readings {
		list = append(list, fmt.Sprintf("%v=%s", u.ticket, u.value))
	}
	return list
}

func away(w http.ResponseWriter, _ int) bool { w.WriteHeader(503); return true }

// TestSpool: what could not be delivered is on the disk, and is delivered by
// the next agent with its ticket, value and time; then the file is empty. A
// monitor that is up costs no write.
func TestSpool(t *testing.T) {
	m, dir := newRecorder(t), filepath.Join(t.TempDir(), "spool")
	d := spoolDelivery(t, m, dir, 1<<20)
	file := filepath.Join(dir, "readings")
	before, err := os.Stat(file)
	if err != nil || before.Size() != 0 || before.Mode() != 0o600 {
		t.Fatalf("got %v, %v", before, err)
	}
	for i := 0; i < 50; i++ {
		d.put(i, reading{value: "1", taken: time.Now()})
		receive(t, "reading", m.readings)
	}
	if now, err := os.Stat(file); err != nil || now.Size() != 0 || !now.ModTime().Equal(before.ModTime()) {
		t.Errorf("written to: %v, %v", now, err)
	}
	m.set(away)
	taken := time.Now().Add(-time.Hour)
	tickets := []any{1, int64(1) << 40, "a \"b\"\né", ""}
	for i, ticket := range tickets {
		d.put(ticket, reading{code: i, value: fmt.Sprint(i, ".50"), taken: taken})
	}
	await(t, "all are on the disk", func() bool { return len(spooled(t, dir)) == len(tickets) })
	d.discard(1)
	d.put(1, reading{code: -15, taken: taken})
	await(t, "the newer one is", func() bool { got := spooled(t, dir); return len(got) == len(tickets) && got[3] == "1=" })
	within(patience, d.close)

	m.set(nil)
	d = spoolDelivery(t, m, dir, 1<<20)
	want := map[any]string{tickets[1]: "1 1.50", tickets[2]: "2 2.50", tickets[3]: "3 3.50", 1: "-15 nan"}
	for range tickets {
		got := receive(t, "reading", m.readings)
		if text := fmt.Sprint(got.code, " ", got.value); want[got.ticket] != text || string(got.time) != taken.UTC().Format(dateTimeLayout) {
			t.Errorf("got %+v; want %q at %s", got, want[got.ticket], taken.UTC().Format(dateTimeLayout))
		}
		delete(want, got.ticket)
	}
	await(t, "the file is empty", func() bool { info, err := os.Stat(file); return err == nil && info.Size() == 0 })
	if n, _ := d.count(); n != 0 || len(m.readings) != 0 {
		t.Errorf("%d left, %d too many", n, len(m.readings))
	}
}

// TestSpoolDamage: any byte of a spool that is flipped, and any end that is
// missing, costs one reading.
func TestSpoolDamage(t *testing.T) {
	at := instantOf(func(now time.Time) time.Time { return now })
	text := ""
	for i := uint64(1); i <= 4; i++ {
		text += readingRecord(i, &undelivered{ticket: fmt.Sprint("t", i), reading: reading{value: "1", taken: at.now}}, at)
	}
	read := func(text string) spoolContent {
		c, err := readSpool(strings.NewReader(text), at)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if c := read(text); len(c.readings) != 4 || c.damaged != 0 || c.last != 4 || !c.readings[0].taken.Equal(at.now.Truncate(time.Millisecond)) && time.Since(c.readings[0].taken) > patience {
		t.Errorf("got %+v", c)
	}
	if c := read(text + markRecord(2) + markRecord(9)); len(c.readings) != 3 || c.last != 9 {
		t.Errorf("got %+v", c)
	}
	for i := range text {
		for _, flip := range []byte{1, 0x80} {
			b := []byte(text)
			b[i] ^= flip
			least := 3
			if text[i] == '\n' { // two lines become one
				least = 2
			}
			if c := read(string(b)); len(c.readings) < least || len(c.readings) > 3 || c.damaged == 0 {
				t.Fatalf("byte %d: %d left, %d damaged", i, len(c.readings), c.damaged)
			}
		}
		whole := strings.Count(text[:i], "\n")
		if text[i] == '\n' { // which alone is missing
			whole++
		}
		if c := read(text[:i]); len(c.readings) != whole {
			t.Fatalf("cut at %d: %d left", i, len(c.readings))
		}
		if c := read(text[:i] + "\n" + text); len(c.readings) != 4 { // written on after a torn record
			t.Fatalf("torn at %d: %d left", i, len(c.readings))
		}
	}
	if c := read(strings.Repeat("x", 100000) + "\n" + strings.Repeat("\x00", 5000) + "\n" + text); len(c.readings) != 4 || c.damaged != 2 {
		t.Errorf("got %+v", c)
	}
}

// TestSpoolClock: a reading keeps the time it was taken at also where the clock
// was set later, in the same boot or before the power went.
func TestSpoolClock(t *testing.T) {
	now := time.Now()
	birth := instant{now: now, wall: time.Unix(300, 0), boot: "aaaaaaaa", up: 300_000}
	set := instant{now: now.Add(time.Hour), wall: time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC), boot: "aaaaaaaa", up: 3900_000}
	text := readingRecord(1, &undelivered{ticket: 1, reading: reading{value: "1", taken: now.Add(-time.Minute)}}, birth)
	for _, test := range []struct {
		text string
		at   instant
		want time.Time
	}{
		{text, birth, time.Unix(240, 0)},
		{text, set, set.wall.Add(-61 * time.Minute)},
		{text + clockRecord(set), instant{now: now, wall: set.wall.AddDate(0, 0, 1), boot: "bbbbbbbb", up: 1000}, set.wall.Add(-61 * time.Minute)},
		{text, instant{now: now, wall: set.wall, boot: "bbbbbbbb", up: 1000}, time.Unix(240, 0)},
		{text, instant{now: now, wall: set.wall, boot: "-"}, time.Unix(240, 0)},
		{text, instant{now: now, wall: set.wall, boot: "aaaaaaaa", up: 1000}, time.Unix(240, 0)}, // a container begun anew
	} {
		c, err := readSpool(strings.NewReader(test.text), test.at)
		if err != nil || len(c.readings) != 1 {
			t.Fatalf("got %+v, %v", c, err)
		}
		if c.moved != (test.at == set) {
			t.Errorf("at %v: moved is %v", test.at.wall, c.moved)
		}
		u := c.readings[0]
		sent := test.at.wall.Add(-test.at.now.Sub(u.taken)) // as attempt has it
		if u.earlier {
			sent = u.taken
		}
		if off := sent.Sub(test.want).Abs(); off > time.Second/100 {
			t.Errorf("at %v: got %v; want %v", test.at.wall, sent, test.want)
		}
	}
}

// TestSpoolFull: the file stays within its limit, whatever comes; the oldest
// go, counted.
func TestSpoolFull(t *testing.T) {
	lines := logged(t)
	m, dir := newRecorder(t), t.TempDir()
	const limit, n = 64 << 10, 3000
	m.set(away)
	d := spoolDelivery(t, m, dir, limit)
	d.put(0, reading{value: "0", taken: time.Now()})
	await(t, "away", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return !d.away.IsZero() })
	for i := 1; i < n; i++ {
		d.put(i, reading{value: strconv.Itoa(i), taken: time.Now()})
		if i%100 == 0 {
			await(t, "it is written", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return len(d.unsaved) == 0 && d.inSpool == len(d.kept) })
			if info, err := os.Stat(filepath.Join(dir, "readings")); err != nil || info.Size() > limit {
				t.Fatalf("got %v, %v", info.Size(), err)
			}
		}
	}
	within(0, d.close)
	left := spooled(t, dir)
	undelivered, totals := d.count()
	if totals.dropped+undelivered != n || len(left) != undelivered || len(left) < limit/200 || left[len(left)-1] != "2999=2999" {
		t.Errorf("%d dropped, %d undelivered, %d on the disk, last %s", totals.dropped, undelivered, len(left), left[len(left)-1])
	}
	if !strings.Contains(lines.String(), "reading dropped: the oldest of what the spool holds") {
		t.Errorf("got %s", lines)
	}
	m = newRecorder(t)
	spoolDelivery(t, m, dir, limit)
	for _, want := range left {
		if got := receive(t, "reading", m.readings); fmt.Sprintf("%v=%s", got.ticket, got.value) != want {
			t.Fatalf("got %+v; want %s", got, want)
		}
	}
}

// TestSpoolBroken: where it cannot be written, that is logged once, readings
// are kept in memory, and written when it works again.
// TestSpoolLate: a spool whose disk comes late is read then, though the monitor
// takes all.
func TestSpoolLate(t *testing.T) {
	logged(t)
	m, dir := newRecorder(t), filepath.Join(t.TempDir(), "spool")
	at := instantOf(func(now time.Time) time.Time { return now })
	record := readingRecord(1, &undelivered{ticket: "early", reading: reading{value: "1", taken: at.now}}, at)
	writeTree(t, filepath.Dir(dir), map[string]string{"spool": ""}) // in its way
	d := spoolDelivery(t, m, dir, 1<<20)
	await(t, "it cannot be used", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return d.spool.err != nil })
	os.Remove(dir)
	writeTree(t, dir, map[string]string{"readings": record})
	d.mu.Lock()
	d.spool.retryAt = time.Now().Add(time.Millisecond)
	d.toWrite.Signal()
	d.mu.Unlock()
	if got := receive(t, "what was in it", m.readings); got.ticket != "early" {
		t.Errorf("got %+v", got)
	}
	await(t, "it is empty", func() bool { return len(spooled(t, dir)) == 0 })
}

func TestSpoolBroken(t *testing.T) {
	lines := logged(t)
	m, dir := newRecorder(t), t.TempDir()
	m.set(away)
	blocked := filepath.Join(dir, "spool")
	if err := os.WriteFile(blocked, nil, 0o600); err != nil { // a file where the directory belongs
		t.Fatal(err)
	}
	d := spoolDelivery(t, m, blocked, 1<<20)
	for i := 0; i < 5; i++ {
		d.put(i, reading{value: "1", taken: time.Now()})
	}
	await(t, "they are kept", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return len(d.unsaved) == 5 })
	if got := lines.String(); strings.Count(got, "spool ") != 1 || !strings.Contains(got, "undelivered readings are in memory alone") {
		t.Errorf("got %s", got)
	}
	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	d.spool.retryAt = time.Time{} // as after a minute
	d.toWrite.Signal()
	d.mu.Unlock()
	await(t, "it works again", func() bool {
		_, err := os.Stat(blocked + "/readings")
		return err == nil && len(spooled(t, blocked)) == 5
	})
	// The file is taken away, and what was in it written again.
	if err := os.RemoveAll(blocked); err != nil {
		t.Fatal(err)
	}
	d.put(5, reading{value: "1", taken: time.Now()})
	await(t, "it is there again", func() bool {
		_, err := os.Stat(blocked + "/readings")
		return err == nil && len(spooled(t, blocked)) == 6
	})
	// Another agent does not get at it, nor at what this one writes.
	next := filepath.Join(blocked, "readings.next")
	if err := os.WriteFile(next, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	other := newSpool(blocked, 1<<20)
	if _, _, err := other.open(); err == nil || err.Error() != "another process uses it" {
		t.Errorf("got %v", err)
	}
	if err := os.Remove(next); err != nil {
		t.Error(err)
	}
	m.set(nil)
	for i := 0; i < 6; i++ {
		receive(t, "reading", m.readings)
	}
}

// TestSpoolFullDisk: a file system with no room left, where root can make one.
func TestSpoolFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	lines := logged(t)
	m := newRecorder(t)
	m.set(away)
	d := spoolDelivery(t, m, dir, 1<<20)
	const n = 3000 // twice what fits
	full := func() bool { return strings.Contains(lines.String(), "no space left on device") }
	d.put(0, reading{value: "1", taken: time.Now()})
	await(t, "away", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return !d.away.IsZero() })
	i := 1
	for ; i < n && !full(); i++ {
		d.put(i, reading{value: "1", taken: time.Now()})
		if i%50 == 0 {
			await(t, "it is written", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return len(d.unsaved) == 0 || full() })
		}
	}
	await(t, "the disk is full", full)
	for end := i + 100; i < end; i++ { // it goes on in memory
		d.put(i, reading{value: "1", taken: time.Now()})
	}
	if got := spooled(t, dir); len(got) < 500 || got[0] != "0=1" {
		t.Errorf("%d on the disk, the first %s", len(got), got[0])
	}
	m.set(nil)
	seen := make(map[any]bool)
	for len(seen) < i {
		seen[receive(t, "reading", m.readings).ticket] = true
	}
	if got := strings.Count(lines.String(), "no space left"); got != 1 {
		t.Errorf("logged %d times", got)
	}
	await(t, "the file is emptied, which takes no space", func() bool {
		info, err := os.Stat(filepath.Join(dir, "readings"))
		return err == nil && info.Size() == 0
	})
}

// FuzzSpool: whatever is in a spool's file, with the right checksums or not,
// it is read, and a reading in it is the same when it is written and read again.
func FuzzSpool(f *testing.F) {
	at := instant{now: time.Now(), wall: time.UnixMilli(1795633466690), boot: "4b825dc6", up: 81299000}
	taken := func(ticket any, r reading) *undelivered {
		r.taken = at.now.Add(-time.Minute)
		return &undelivered{reading: r, ticket: ticket}
	}
	records := []string{
		readingRecord(1, taken(7, reading{value: "0.42"}), at),
		readingRecord(2, taken(int64(1)<<40, reading{code: -15}), at),
		readingRecord(3, taken("a \"b\"\n\xffü", reading{code: 3, value: "-1e6"}), instant{now: at.now, wall: at.wall, boot: "-"}),
		markRecord(2),
		clockRecord(at),
	}
	unsummed := ""
	for _, record := range records {
		f.Add([]byte(record), false)
		unsummed += record[len("01234567 "):]
	}
	f.Add([]byte(strings.Join(records, "")), false)
	f.Add([]byte(unsummed), true)
	f.Add([]byte(unsummed[:len(unsummed)-1]), true)
	f.Fuzz(func(t *testing.T, data []byte, sum bool) {
		if sum {
			lines := strings.Split(string(data), "\n")
			data = nil
			for _, line := range lines {
				data = append(data, summed(line)...)
			}
		}
		c, err := readSpool(bytes.NewReader(data), at)
		lines := bytes.Count(data, []byte("\n"))
		if len(data) > 0 && data[len(data)-1] != '\n' {
			lines++ // cut off, but for its end perhaps whole
		}
		if err != nil || len(c.readings)+c.damaged > lines {
			t.Fatalf("got %d readings, %d damaged of %d lines, %v", len(c.readings), c.damaged, lines, err)
		}
		for _, u := range c.readings {
			if wire := wireTicket(u.ticket); len(wire) > 8*maxTicket {
				continue // no command has one
			}
			again, err := readSpool(strings.NewReader(readingRecord(u.record, u, at)), at)
			if err != nil || len(again.readings) != 1 {
				t.Fatalf("%+v reads back as %+v, %v", u, again, err)
			}
			if a := again.readings[0]; a.ticket != u.ticket || a.code != u.code || a.value != u.value || a.record != u.record {
				t.Fatalf("%+v reads back as %+v", u, a)
			}
		}
	})
}

// TestSpoolChanged: another directory takes over what the one before holds.
func TestSpoolChanged(t *testing.T) {
	m, dir := newRecorder(t), t.TempDir()
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "two")
	m.set(away)
	d := spoolDelivery(t, m, one, 1<<20)
	d.put(1, reading{value: "1", taken: time.Now()})
	await(t, "it is in the first", func() bool { return len(spooled(t, one)) == 1 })
	d.useSpool(newSpool(two, 1<<20))
	await(t, "it is in the second", func() bool {
		_, err := os.Stat(two + "/readings")
		return err == nil && len(spooled(t, two)) == 1 && len(spooled(t, one)) == 0
	})
	d.useSpool(nil)
	await(t, "it is in none", func() bool { return len(spooled(t, two)) == 0 })
	// What is undelivered when there is a spool again belongs in it.
	d.useSpool(newSpool(one, 1<<20))
	await(t, "it is in the first again", func() bool { return len(spooled(t, one)) == 1 })
	// So does what came while there was one that could not be used.
	blocked := filepath.Join(dir, "blocked")
	if err := os.WriteFile(blocked, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d.useSpool(newSpool(blocked, 1<<20))
	d.put(2, reading{value: "2", taken: time.Now()})
	await(t, "it cannot be used", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return d.spool.dir == blocked && d.spool.err != nil })
	if got := spooled(t, one); len(got) != 1 {
		t.Errorf("left in the first: %q", got)
	}
	d.useSpool(newSpool(one, 1<<20))
	await(t, "both are in the first", func() bool { return fmt.Sprint(spooled(t, one)) == "[1=1 2=2]" })
	d.useSpool(newSpool(two, 1<<20))
	await(t, "both are in the second alone", func() bool {
		return fmt.Sprint(spooled(t, two)) == "[1=1 2=2]" && len(spooled(t, one)) == 0
	})
	// One that could not be used when the agent ends leaves the one before as it was.
	d.useSpool(newSpool(blocked, 1<<20))
	within(patience, d.close)
	select {
	case <-d.saved:
	default:
		t.Error("it goes on trying")
	}
	if got := fmt.Sprint(spooled(t, two)); got != "[1=1 2=2]" {
		t.Errorf("left in the second: %s", got)
	}
}

func TestBackoff(t *testing.T) {
	for n := 1; n < 100; n++ {
		want := maxBackoff
		if n < 10 {
			want = time.Second << (n - 1)
		}
		for i := 0; i < 100; i++ {
			if got := backoff(time.Second, n); got < want/2 || got > want*3/2+1 {
				t.Fatalf("%d: got %v; want %v ±50 %%", n, got, want)
			}
		}
	}
}

// TestLocalZone compares with what date shows.
func TestLocalZone(t *testing.T) {
	zones := []string{"", "UTC", "CET-1CEST,M3.5.0,M10.5.0/3", "<-03>3", "EST5EDT,M3.2.0,M11.1.0", "AEST-10AEDT,M10.1.0,M4.1.0/3", ":UTC0", "IST-5:30", "<+1245>-12:45<+1345>,M9.5.0/2:45,M4.1.0/3:45"}
	for _, file := range []string{"/usr/share/zoneinfo/Europe/Berlin", "/usr/share/zoneinfo/America/New_York"} {
		if _, err := os.Stat(file); err == nil {
			zones = append(zones, file, strings.TrimPrefix(file, "/usr/share/zoneinfo/"))
		}
	}
	for _, tz := range zones {
		t.Setenv("TZ", tz)
		zone := localZone()
		for _, at := range []int64{0, 1700000000, 1780000000, 1793498399, 1793498401} {
			cmd := exec.Command("date", "-d", fmt.Sprintf("@%d", at), "+%Y%m%dT%H:%M:%S")
			want, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			if got := time.Unix(at, 0).In(zone).Format(dateTimeLayout); got != strings.TrimSpace(string(want)) {
				t.Errorf("TZ=%s at %d: got %s; date says %s", tz, at, got, want)
			}
		}
	}
	for _, bad := range []string{"nonsense/zone", "CET", "\n", "CET-1CEST,M13.5.0"} {
		if zone, err := posixZone(bad); err == nil && bad != "CET" {
			t.Errorf("%q: got %v", bad, time.Unix(0, 0).In(zone))
		}
	}
	t.Setenv("TZ", "/dev/zero") // which has no end
	if got := time.Unix(0, 0).In(localZone()).Hour(); got != 0 {
		t.Errorf("got %d", got)
	}
	// Without TZ it is /etc/localtime, then /etc/TZ.
	etc := t.TempDir()
	noon := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	hour := func(tz string, set bool) int { return noon.In(zoneOf(tz, set, etc)).Hour() }
	if got := hour("", false); got != 12 {
		t.Errorf("nothing there: got %d; want UTC", got)
	}
	if err := os.WriteFile(filepath.Join(etc, "TZ"), []byte("CET-1CEST,M3.5.0,M10.5.0/3\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := hour("", false); got != 14 {
		t.Errorf("/etc/TZ: got %d; want 14", got)
	}
	if data, err := os.ReadFile("/usr/share/zoneinfo/America/New_York"); err == nil {
		if err := os.WriteFile(filepath.Join(etc, "localtime"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := hour("", false); got != 8 {
			t.Errorf("/etc/localtime: got %d; want 8", got)
		}
	}
	if got := hour("", true); got != 12 {
		t.Errorf("TZ=: got %d; want UTC", got)
	}
}

func TestLogLimit(t *testing.T) {
	lines := logged(t)
	l := logLimit{burst: 3, perSecond: 1}
	for i := 0; i < 10; i++ {
		l.printf("line %d", i)
	}
	l.last = l.last.Add(-2 * time.Second)
	l.printf("later")
	if want := "line 0\nline 1\nline 2\n7 lines left out\nlater\n"; lines.String() != want {
		t.Errorf("got %q; want %q", lines, want)
	}
}

// A packed is one entry of a package that a test builds.
type packed struct {
	tar.Header
	body string
}

// packageOf returns a package, not compressed, with these entries in order.
func packageOf(t testing.TB, entries ...packed) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			if strings.HasSuffix(h.Name, "/") {
				h.Typeflag = tar.TypeDir
			}
		}
		if h.Mode == 0 && h.Typeflag != tar.TypeXGlobalHeader {
			h.Mode = 0o755
		}
		if h.Typeflag == tar.TypeReg && h.Size == 0 {
			h.Size = int64(len(e.body))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	w.Flush()
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

// entry is a file of a package, or with a slash at the end of its name a directory.
func entry(name, body string) packed { return packed{tar.Header{Name: name}, body} }

// writeTree makes the files of a map, executable; names that end in a slash are directories.
func writeTree(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for _, name := range sortedKeys(files) {
		file := filepath.Join(dir, name)
		parent := filepath.Dir(file)
		if strings.HasSuffix(name, "/") {
			parent = file
		}
		err := os.MkdirAll(parent, 0o755)
		if err == nil && parent != file {
			err = os.WriteFile(file, []byte(files[name]), 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// readTree is what writeTree has written, times replaced by TIME.
func readTree(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	err := filepath.WalkDir(dir, func(file string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() == lockName {
			return err
		}
		name, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(file)
		files[regexp.MustCompile(`_\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d`).ReplaceAllString(name, "_TIME")] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// leftovers lists what an update must not leave in its two directories.
func leftovers(t testing.TB, dirs ...string) []string {
	t.Helper()
	var left []string
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(dir, ".*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if filepath.Base(file) != lockName {
				left = append(left, file)
			}
		}
	}
	return left
}

// testUpdater returns an updater of dir/sensors and dir/backup with these
// files in them, which takes packages of 1 MiB that unpack to 2 MiB.
func testUpdater(t testing.TB, dir string, before map[string]string) *updater {
	t.Helper()
	writeTree(t, dir, before)
	for _, name := range []string{"sensors", "backup"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s := newSensors(filepath.Join(dir, "sensors"), "check", "options", patience, 2, nil)
	return newUpdater(s, filepath.Join(dir, "backup"), "", 1<<20, 2<<20, 3)
}

// fromBytes is a source of a package that is in memory.
func fromBytes(archive []byte, signature string) source {
	return source{
		archive:   func(_ context.Context, to io.Writer) error { _, err := to.Write(archive); return err },
		signature: func(context.Context) ([]byte, error) { return []byte(signature), nil },
	}
}

// printing is a sensor that prints a number.
func printing(n int) string { return fmt.Sprintf("#!/bin/sh\necho %d\n", n) }

func TestInstall(t *testing.T) {
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join("testdata/packages", name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	one, two := printing(1), printing(2)
	demo := map[string]string{
		"sensors/demo/check":      "#!/bin/sh\n. ./lib/answer\ncase $1 in options) echo \"answer  the answer\" ;; *) echo $answer ;; esac\n",
		"sensors/demo/lib/answer": "answer=42\n", "sensors/demo/version": "1.0\n",
	}
	tests := []struct {
		name          string
		before, after map[string]string
		archive       []byte
	}{
		{"bzip2", nil, demo, read("demo.tar.bz2")},
		{"gzip", nil, demo, read("demo.tar.gz")},
		{"with ./", nil, demo, read("dot.tar.bz2")},
		{"PAX", nil, demo, read("pax.tar.bz2")},
		{"replaced", map[string]string{"sensors/demo/check": one, "sensors/demo/data": "x", "sensors/other/check": one},
			map[string]string{"sensors/demo/check": two, "sensors/other/check": one, "backup/demo_TIME/check": one, "backup/demo_TIME/data": "x"},
			packageOf(t, entry("demo/", ""), entry("demo/check", two))},
		{"no entries for directories", nil, map[string]string{"sensors/demo/check": one, "sensors/demo/a/b/c": "d"},
			packageOf(t, entry("demo/a/b/c", "d"), entry("demo/a/", ""), entry("demo/", ""), entry("demo/check", one))},
		{"a newer version", map[string]string{"sensors/demo/check": one, "sensors/demo/version": "1.9\n"},
			map[string]string{"sensors/demo/check": two, "sensors/demo/version": "1.10", "backup/demo_TIME/check": one, "backup/demo_TIME/version": "1.9\n"},
			packageOf(t, entry("demo/", ""), entry("demo/version", "1.10"), entry("demo/check", two))},
		{"left by a power cut", map[string]string{"sensors/.picket-staging/x/y": "z", "sensors/.picket-trial-x/y": "z", "backup/.x_2026-01-01T00:00:00/y": "z", "backup/.profile": "mine"},
			map[string]string{"sensors/demo/check": one, "backup/.profile": "mine"},
			packageOf(t, entry("demo/", ""), entry("demo/check", one))},
	}
	for _, test := range tests {
		dir := t.TempDir()
		u := testUpdater(t, dir, test.before)
		if err := u.install(context.Background(), "demo", fromBytes(test.archive, "")); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		if got := readTree(t, dir); !reflect.DeepEqual(got, test.after) {
			t.Errorf("%s: got %q; want %q", test.name, got, test.after)
		}
		if r := u.sensors.read(context.Background(), "demo", nil, nil); r.code != 0 {
			t.Errorf("%s: got %+v", test.name, r)
		}
	}

	dir := t.TempDir()
	u := testUpdater(t, dir, nil)
	archive := packageOf(t, packed{tar.Header{Name: "demo/", Mode: 0o7777}, ""}, packed{tar.Header{Name: "demo/check", Mode: 0o6777, Uid: 12, Gid: 34}, printing(1)}, packed{tar.Header{Name: "demo/secret", Mode: 0o600}, "x"})
	if err := u.install(context.Background(), "demo", fromBytes(archive, "")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{"demo": os.ModeDir | 0o775, "demo/check": 0o775, "demo/secret": 0o600} {
		info, err := os.Stat(u.at(name))
		if err != nil || info.Mode() != want || int(info.Sys().(*syscall.Stat_t).Uid) != os.Geteuid() {
			t.Errorf("%s: got %v, %v; want %v", name, info.Mode(), err, want)
		}
	}
}

// TestInstallRefused: whatever is wrong with a package, nothing changes.
func TestInstallRefused(t *testing.T) {
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join("testdata/packages", name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	top, check, newest := entry("demo/", ""), entry("demo/check", printing(1)), entry("demo/version", "9")
	typed := func(typeflag byte, name, link string) packed {
		return packed{tar.Header{Typeflag: typeflag, Name: name, Linkname: link}, ""}
	}
	with := func(entries ...packed) []byte { return packageOf(t, append([]packed{top, check}, entries...)...) }
	many := []packed{top, check}
	for i := 0; i < maxEntries; i++ {
		many = append(many, entry(fmt.Sprintf("demo/%d", i), ""))
	}
	good := with()
	badSize := slices.Clone(good) // the size of demo/check made negative in base 256, the sum corrected
	copy(badSize[512+124:], "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe")
	hugeSize := slices.Clone(good)
	copy(hugeSize[512+124:], "77777777777\x00")
	for _, b := range [][]byte{badSize, hugeSize} {
		sum := 0
		for i, c := range b[512:1024] {
			if i >= 148 && i < 156 {
				c = ' '
			}
			sum += int(c)
		}
		copy(b[512+148:], fmt.Sprintf("%06o\x00 ", sum))
	}
	tests := []struct {
		name    string
		archive []byte
		want    string
	}{
		{"empty", nil, "unpack: the package is empty"},
		{"rubbish", bytes.Repeat([]byte("rubbish "), 200), "unpack: archive/tar: invalid tar header"},
		{"HTML", []byte("<html>not found</html>"), "unpack: .*"},
		{"cut off in an entry", good[:1030], "unpack .*unexpected EOF"},
		{"cut off behind an entry", good[:1536], "unpack: the archive is cut off"},
		{"cut off in the end", good[:1536+512], "unpack: the archive is cut off"},
		{"zeros", make([]byte, 1024), "unpack: no directory \"demo\" in the package"},
		{"truncated bzip2", read("truncated.tar.bz2"), "unpack.*EOF"},
		{"changed bzip2", read("crc.tar.bz2"), "unpack.*(bzip2|invalid tar header).*"},
		{"truncated gzip", read("demo.tar.gz")[:150], "unpack.*EOF"},
		{"a bomb", read("bomb.tar.bz2"), `unpack "demo/check": unpacks to more than max_unpacked, 2097152 bytes`},
		{"a bomb behind the end", read("tail.tar.bz2"), "unpack: too many zeros follow the archive's end"},
		{"something behind the end", append(slices.Clone(good), "x"...), "unpack: something follows the archive's end"},
		{"a second archive", append(slices.Clone(good), good...), "unpack: something follows the archive's end"},
		{"a negative size", badSize, "unpack: archive/tar: invalid tar header"},
		{"a huge size", hugeSize, `unpack "demo/check": unpacks to more than .*`},
		{"too large", bytes.Repeat([]byte("x"), 1<<20+1), "fetch: larger than max_package, 1048576 bytes"},
		{"too much in many files", with(packed{tar.Header{Name: "demo/a"}, strings.Repeat("x", 500000)}, packed{tar.Header{Name: "demo/b"}, strings.Repeat("x", 500000)}), ""},
		{"too many entries", packageOf(t, many...), `unpack "demo/[0-9]+": more than 1024 entries`},
		{"absolute", with(entry("/etc/passwd", "x")), `unpack "/etc/passwd": an absolute path`},
		{"absolute directory", with(entry("/etc/", "")), `unpack "/etc/": an absolute path`},
		{"escapes", with(entry("../passwd", "x")), `unpack "../passwd": path escapes the package`},
		{"escapes within", with(entry("demo/../../passwd", "x")), `unpack .*: path escapes the package`},
		{"comes back", with(entry("demo/../demo/x", "x")), `unpack .*: path escapes the package`},
		{"dots", with(entry("demo/./x", "x")), `unpack .*: not a plain path`},
		{"slashes", with(entry("demo//x", "x")), `unpack .*: not a plain path`},
		{"PAX path", withRecords(t, entry("demo/x", "x"), "path", "../x"), `unpack .*: path escapes the package`},
		{"a symbolic link", with(typed(tar.TypeSymlink, "demo/x", "/etc/passwd")), `unpack "demo/x": links are refused`},
		{"a link", with(typed(tar.TypeLink, "demo/x", "demo/check")), `unpack "demo/x": links are refused`},
		{"the top a link", packageOf(t, typed(tar.TypeSymlink, "demo", "/etc")), `unpack "demo": links are refused`},
		{"a device", with(typed(tar.TypeChar, "demo/x", "")), `unpack "demo/x": neither a file nor a directory .*`},
		{"a block device", with(typed(tar.TypeBlock, "demo/x", "")), `unpack "demo/x": neither a file nor a directory .*`},
		{"a fifo", with(typed(tar.TypeFifo, "demo/x", "")), `unpack "demo/x": neither a file nor a directory .*`},
		{"a global header", packageOf(t, packed{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}, ""}, top, check), `unpack .*: neither a file nor a directory .*`},
		{"sparse", withRecords(t, entry("demo/GNUSparseFile.0/x", "1\n0\n0\n"+strings.Repeat("\x00", 506)), "GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.name", "demo/x", "GNU.sparse.realsize", "1048576"), `unpack "demo/x": sparse files are refused`},
		{"a duplicate", with(check), `unpack "demo/check": twice in the package`},
		{"a directory twice", with(top), `unpack "demo/": twice in the package`},
		{"a file on a directory", with(entry("demo/d/", ""), entry("demo/d", "x")), `unpack "demo/d": twice in the package`},
		{"a file on an implied directory", with(entry("demo/d/e", "x"), entry("demo/d", "x")), `unpack "demo/d": twice in the package`},
		{"a directory on a file", with(entry("demo/check/x", "x")), `unpack "demo/check/x": .*(not a directory|file exists)`},
		{"a second top", with(entry("other/x", "x")), `unpack "other/x": not in the directory "demo", the sensor that the package is for`},
		{"another top", packageOf(t, entry("other/", ""), entry("other/check", "x")), `unpack "other/": not in the directory "demo", the sensor that the package is for`},
		{"no top", packageOf(t, entry("check", "x")), `unpack "check": not in the directory "demo", the sensor that the package is for`},
		{"the top a file", packageOf(t, entry("demo", "x")), `unpack "demo": not a directory`},
		{"a long name", with(entry("demo/"+strings.Repeat("x", 255), "x")), `unpack .*: a name of more than 255 bytes`},
		{"a newline", with(entry("demo/a\nb", "x")), `unpack .*: a name with control characters`},
		{"an escape", with(entry("demo/a\x1b[2J", "x")), `unpack .*: a name with control characters`},
		{"not UTF-8", with(entry("demo/a\xff", "x")), `unpack .*: a name with control characters`},
		{"no check", packageOf(t, top, entry("demo/other", "x"), newest), `it holds no executable check`},
		{"check a directory", packageOf(t, top, entry("demo/check/", ""), newest), `try check options: exit 126: .*`},
		{"no run bit", packageOf(t, top, packed{tar.Header{Name: "demo/check", Mode: 0o644}, printing(1)}, newest), `try check options: exit 126: .*permission denied`},
		{"the trial fails", packageOf(t, top, entry("demo/check", "#!/bin/sh\necho no >&2; exit 3\n"), newest), `try check options: exit 3: "no"`},
		{"directories in names only", with(entry("demo/"+strings.Repeat("a/", 100)+"x", ""), entry("demo/b/"+strings.Repeat("a/", 100)+"x", ""), entry("demo/c/"+strings.Repeat("a/", 100)+"x", ""), entry("demo/d/"+strings.Repeat("a/", 100)+"x", ""), entry("demo/e/"+strings.Repeat("a/", 100)+"x", ""), entry("demo/f/"+strings.Repeat("a/", 100)+"x", ""), entry("demo/g/"+strings.Repeat("a/", 100)+"x", ""), entry("demo/h/"+strings.Repeat("a/", 100)+"x", ""), entry("demo/i/"+strings.Repeat("a/", 100)+"x", ""), entry("demo/j/"+strings.Repeat("a/", 100)+"x", ""), entry("demo/k/"+strings.Repeat("a/", 100)+"x", "")), `unpack .*: more than 1024 entries`},
		{"a trial that leaves closed directories", packageOf(t, top, entry("demo/check", "#!/bin/sh\nmkdir d; echo >d/f; chmod 0 d; exit 1\n"), newest), `try check options: exit 1`},
		{"no version", with(), `version: none in the package; 1.2.3 is known here`},
		{"an older version", with(entry("demo/version", "1.2.2.9")), `version: 1.2.2.9 is older than 1.2.3, which is known here`},
		{"no sane version", with(entry("demo/version", "latest")), `version: "latest" is not a version such as 1.4.2`},
	}
	for _, test := range tests {
		dir := t.TempDir()
		before := map[string]string{"sensors/demo/check": printing(0), "sensors/demo/version": "1.2.3.0\n", "backup/demo_TIME/check": "x"}
		u := testUpdater(t, dir, before)
		if test.want == "" { // too much in many files: within the limit here, not there
			u.maxUnpacked, test.want = 900000, `unpack "demo/b": unpacks to more than max_unpacked, 900000 bytes`
		}
		err := u.install(context.Background(), "demo", fromBytes(test.archive, ""))
		if !regexp.MustCompile("^(?s:" + test.want + ")$").MatchString(fmt.Sprint(err)) {
			t.Errorf("%s: got %v; want %s", test.name, err, test.want)
		}
		if got := readTree(t, dir); !reflect.DeepEqual(got, before) {
			t.Errorf("%s: got %q; want nothing changed", test.name, got)
		}
		if left := leftovers(t, u.sensors.path, u.backup); len(left) > 0 {
			t.Errorf("%s: left %q", test.name, left)
		}
	}
	t.Logf("%d hostile packages refused", len(tests))
}

// withRecords is a package in which these PAX records stand before an entry.
func withRecords(t *testing.T, e packed, records ...string) []byte {
	t.Helper()
	var text string
	for i := 0; i < len(records); i += 2 {
		record := " " + records[i] + "=" + records[i+1] + "\n"
		n := len(record) + 2 // its length counts itself: two digits
		text += strconv.Itoa(n) + record
	}
	b := packageOf(t, entry("demo/", ""), entry("demo/check", printing(1)), entry("demo/pax", text), e)
	h := b[bytes.Index(b, []byte("demo/pax")):][:512]
	h[156] = 'x' // no file, but records of the next entry
	copy(h[148:], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// TestInstallLocked: who else holds a lock on the sensors' directory does not
// stop the agent, and a directory that is both is refused.
func TestInstallLocked(t *testing.T) {
	dir := t.TempDir()
	u := testUpdater(t, dir, map[string]string{"sensors/demo/check": printing(1)})
	held, err := u.sensors.lock(context.Background(), syscall.LOCK_EX, patience)
	if err != nil {
		t.Fatal(err)
	}
	if texts, err := u.sensors.helpTexts(context.Background()); err != nil || len(texts) != 1 {
		t.Errorf("got %q, %v", texts, err)
	}
	if r := u.sensors.read(context.Background(), "none", nil, nil); r.code != codeNotFound {
		t.Errorf("got %+v", r)
	}
	held.Close()
	lock, err := os.OpenFile(u.at(lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := flockWithin(context.Background(), lock, syscall.LOCK_EX, 0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := u.rollback(ctx, "demo"); err == nil || !strings.Contains(err.Error(), "another process is changing the sensors") {
		t.Errorf("got %v", err)
	}
	if err := u.recover(context.Background()); err != nil {
		t.Errorf("recover beside another process: %v", err)
	}
	lock.Close()
	if err := os.Remove(u.backup); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("sensors", u.backup); err != nil {
		t.Fatal(err)
	}
	if err := u.rollback(context.Background(), "demo"); err == nil || !strings.Contains(err.Error(), "the same directory") {
		t.Errorf("got %v", err)
	}
}

func TestInstallNoSpace(t *testing.T) {
	u := testUpdater(t, t.TempDir(), nil)
	if err := u.enoughSpace(u.backup, 1); err != nil {
		t.Error(err)
	}
	if err := u.enoughSpace(u.backup, 1<<60); err == nil || !strings.Contains(err.Error(), "no space: ") {
		t.Errorf("got %v", err)
	}
}

// signify makes a key pair and returns the public key's file and a function
// that signs.
func signify(t testing.TB, number string) (public string, sign func([]byte) string) {
	key, secret, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	text := func(what string, data []byte) string {
		return "untrusted comment: " + what + "\n" + base64.StdEncoding.EncodeToString(append([]byte("Ed"+number), data...)) + "\n"
	}
	return text("picket public key", key), func(message []byte) string { return text("verify with picket.pub", ed25519.Sign(secret, message)) }
}

func TestVerify(t *testing.T) {
	dir := t.TempDir()
	u := testUpdater(t, dir, nil)
	archive := packageOf(t, entry("demo/", ""), entry("demo/check", printing(1)))
	public, sign := signify(t, "keynum_1")
	public2, sign2 := signify(t, "keynum_2")
	_, impostor := signify(t, "keynum_1")
	u.keys = filepath.Join(dir, "keys")
	writeTree(t, u.keys, map[string]string{"a.pub": public, "b.pub": public2, "README": "no key"})
	install := func(name string, archive []byte, signature string) string {
		return fmt.Sprint(u.install(context.Background(), name, fromBytes(archive, signature)))
	}
	for i, signature := range []string{sign(archive), sign2(archive), strings.TrimSuffix(sign(archive), "\n")} {
		if got := install("demo", archive, signature); got != "<nil>" {
			t.Errorf("%d: %s", i, got)
		}
	}
	_, stranger := signify(t, "keynum_3")
	line := strings.Split(sign(archive), "\n")[1]
	tests := []struct{ name, signature, want string }{
		{"demo", stranger(archive), "verify: signed with key 6b65796e756d5f33, which is not known"},
		{"demo", impostor(archive), "verify: the signature does not fit the package"},
		{"demo", sign(archive[1:]), "verify: the signature does not fit the package"},
		{"other", sign(archive), `unpack "demo/": not in the directory "other", the sensor that the package is for`},
		{"demo", "", "verify: signature: its first line is no untrusted comment"},
		{"demo", "untrusted comment: x", "verify: signature: it has one line only"},
		{"demo", "trusted comment: x\n" + line + "\n", "verify: signature: its first line is no untrusted comment"},
		{"demo", sign(archive) + "\n", "verify: signature: it has more than two lines"},
		{"demo", sign(archive) + line, "verify: signature: it has more than two lines"},
		{"demo", "untrusted comment: x\r\n" + line + "\r\n", "verify: signature: it has more than two lines"},
		{"demo", "untrusted comment: x\n" + line[4:] + "\n", "verify: signature: .*"},
		{"demo", "untrusted comment: x\n!" + line[1:] + "\n", "verify: signature: its second line is not base64: .*"},
		{"demo", "untrusted comment: x\n" + base64.StdEncoding.EncodeToString([]byte("RS"+strings.Repeat("x", 72))) + "\n", `verify: signature: its algorithm is "RS"; want "Ed"`},
		{"demo", public, "verify: signature: its second line holds 42 bytes; want 74"},
	}
	for _, test := range tests {
		if got := install(test.name, archive, test.signature); !regexp.MustCompile("^" + test.want + "$").MatchString(got) {
			t.Errorf("got %s; want %s", got, test.want)
		}
	}

	// One flipped bit anywhere.
	file := filepath.Join(dir, "package")
	flipped := 0
	verify := func(archive []byte, signature string) error {
		if err := os.WriteFile(file, archive, 0o600); err != nil {
			t.Fatal(err)
		}
		flipped++
		return u.verify(context.Background(), file, fromBytes(nil, signature))
	}
	signature := sign(archive)
	if err := verify(archive, signature); err != nil {
		t.Fatal(err)
	}
	start := strings.Index(signature, "\n") + 1 // the comment is not trusted, nor is it used
	for i := 8 * start; i < 8*(len(signature)-1); i++ {
		bad := []byte(signature)
		bad[i/8] ^= 1 << (i % 8)
		if err := verify(archive, string(bad)); err == nil {
			t.Errorf("bit %d of the signature flipped: taken", i)
		}
	}
	for i := range archive {
		bad := slices.Clone(archive)
		bad[i] ^= 1 << (i % 8)
		if err := verify(bad, signature); err == nil {
			t.Errorf("bit flipped in byte %d of the package: taken", i)
		}
	}
	for i := 8 * (strings.Index(public, "\n") + 1); i < 8*(len(public)-1); i++ {
		bad := []byte(public)
		bad[i/8] ^= 1 << (i % 8)
		writeTree(t, u.keys, map[string]string{"a.pub": string(bad)})
		if err := verify(archive, signature); err == nil {
			t.Errorf("bit %d of the key flipped: taken", i)
		}
	}
	t.Logf("%d flipped bits refused", flipped-1)

	writeTree(t, u.keys, map[string]string{"a.pub": "rubbish"})
	if got := install("demo", archive, sign(archive)); !regexp.MustCompile("^verify: public key: .*a.pub: its first line is no untrusted comment$").MatchString(got) {
		t.Errorf("got %s", got)
	}
	u.keys = filepath.Join(dir, "keys", "b.pub")
	if got := install("demo", archive, sign2(archive)); got != "<nil>" {
		t.Errorf("a key that is a file: %s", got)
	}
	for keys, want := range map[string]string{dir: "verify: public key: no \\*.pub in .*", dir + "/none": "verify: public key: .*no such file or directory"} {
		u.keys = keys
		if got := install("demo", archive, sign2(archive)); !regexp.MustCompile("^" + want + "$").MatchString(got) {
			t.Errorf("%s: got %s; want %s", keys, got, want)
		}
	}
	if left := leftovers(t, u.sensors.path, u.backup); len(left) > 0 {
		t.Errorf("left %q", left)
	}
}

// TestVerifySignify takes what the real tools make.
func TestVerifySignify(t *testing.T) {
	tool := program(t, "signify-openbsd")
	dir := t.TempDir()
	archive, err := os.ReadFile("testdata/packages/demo.tar.bz2")
	if err != nil {
		t.Fatal(err)
	}
	writeTree(t, dir, map[string]string{"demo.tar.bz2": string(archive)})
	for _, args := range []string{"-G -n -p fleet.pub -s fleet.sec", "-S -s fleet.sec -m demo.tar.bz2"} {
		cmd := exec.Command(tool, strings.Fields(args)...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", args, err, out)
		}
	}
	u := testUpdater(t, dir, nil)
	u.keys = filepath.Join(dir, "fleet.pub")
	if err := u.install(context.Background(), "demo", fromFile(filepath.Join(dir, "demo.tar.bz2"))); err != nil {
		t.Error(err)
	}
	archive[100] ^= 1
	writeTree(t, dir, map[string]string{"demo.tar.bz2": string(archive)})
	if err := u.install(context.Background(), "demo", fromFile(filepath.Join(dir, "demo.tar.bz2"))); err == nil || !strings.Contains(err.Error(), "does not fit") {
		t.Errorf("got %v", err)
	}
}

// TestInstallRealTools takes what tar and bzip2 of this machine make of the
// shipped sensors.
func TestInstallRealTools(t *testing.T) {
	tool := program(t, "tar")
	program(t, "bzip2")
	dir, source := t.TempDir(), t.TempDir()
	writeTree(t, source, shipped(t, "sensors/"))
	source = filepath.Join(source, "sensors")
	u := testUpdater(t, dir, nil)
	for _, name := range []string{"disk", "uptime"} {
		file := filepath.Join(dir, name+".tar.bz2")
		if out, err := exec.Command(tool, "-C", source, "-cjf", file, name).CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		if err := u.install(context.Background(), name, fromFile(file)); err != nil {
			t.Error(err)
		}
		if !reflect.DeepEqual(readTree(t, u.at(name)), readTree(t, filepath.Join(source, name))) {
			t.Errorf("%s is not what was packed", name)
		}
	}
}

func TestRollback(t *testing.T) {
	dir := t.TempDir()
	u := testUpdater(t, dir, map[string]string{"sensors/demo/check": printing(1)})
	state := func() string { // the version in place, and the backups, oldest first
		backups, err := u.backups("demo")
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, file := range append([]string{u.at("demo", "check")}, backups...) {
			if !filepath.IsAbs(file) {
				file = filepath.Join(u.backup, file, "check")
			}
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, strings.Fields(string(text))[2])
		}
		return strings.Join(all, " ")
	}
	ctx := context.Background()
	install := func(n int) error {
		return u.install(ctx, "demo", fromBytes(packageOf(t, entry("demo/", ""), entry("demo/check", printing(n))), ""))
	}
	rollback := func(int) error { return u.rollback(ctx, "demo") }
	if err := u.rollback(ctx, "demo"); err == nil || err.Error() != "there is no backup" {
		t.Errorf("got %v", err)
	}
	for _, step := range []struct {
		do   func(int) error
		n    int
		want string
	}{
		{install, 2, "2 1"}, {install, 3, "3 1 2"}, {rollback, 0, "2 1 3"}, {rollback, 0, "3 1 2"},
		{install, 4, "4 1 2 3"}, {rollback, 0, "3 1 2 4"}, {install, 4, "4 2 4 3"}, {install, 5, "5 4 3 4"}, {install, 1, "1 3 4 5"}, {install, 2, "2 4 5 1"}, {install, 3, "3 5 1 2"}, {install, 4, "4 1 2 3"}, {install, 5, "5 2 3 4"}, {install, 6, "6 3 4 5"},
	} {
		if err := step.do(step.n); err != nil || state() != step.want {
			t.Fatalf("got %s, %v; want %s", state(), err, step.want)
		}
	}
	u.keep = 0
	if err := install(7); err != nil || state() != "7 3 4 5 6" {
		t.Errorf("got %s, %v; want 7 3 4 5 6", state(), err)
	}
	u.keep = 1
	if err := install(8); err != nil || state() != "8 7" {
		t.Errorf("got %s, %v; want 8 7", state(), err)
	}
	// Where the clock is behind, order is kept all the same.
	backups, err := u.backups("demo")
	if err != nil || len(backups) != 1 {
		t.Fatal(backups, err)
	}
	if err := os.Rename(filepath.Join(u.backup, backups[0]), filepath.Join(u.backup, "demo_2999-12-31T23:59:59")); err != nil {
		t.Fatal(err)
	}
	u.keep = 2
	if err := install(9); err != nil || state() != "9 7 8" {
		t.Errorf("got %s, %v; want 9 7 8", state(), err)
	}
	if _, err := os.Stat(filepath.Join(u.backup, "demo_3000-01-01T00:00:00")); err != nil {
		t.Error(err)
	}
}

// otherFileSystem returns a new directory that renaming cannot reach from
// temporary ones, or "".
func otherFileSystem(t *testing.T) string {
	for _, parent := range []string{"/dev/shm", "/run", "/var/tmp"} {
		dir, err := os.MkdirTemp(parent, "picket-test-")
		if err != nil {
			continue
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		if err := os.Link(dir, filepath.Join(t.TempDir(), "x")); !errors.Is(err, syscall.EXDEV) {
			from := filepath.Join(t.TempDir(), "x")
			os.Mkdir(from, 0o700)
			if err := os.Rename(from, filepath.Join(dir, "y")); !errors.Is(err, syscall.EXDEV) {
				continue
			}
		}
		return dir
	}
	return ""
}

// A crash is a change that a test stops dead at each step.
type crash struct {
	name    string
	before  map[string]string
	run     func(u *updater) error
	outcome []string // what is in place then: "" is nothing
}

var crashPackage = func(t testing.TB) source {
	return fromBytes(packageOf(t, entry("demo/", ""), entry("demo/check", printing(2)), entry("demo/lib/data", "2")), "")
}

func crashes(t testing.TB) []crash {
	one := map[string]string{"sensors/demo/check": printing(1), "sensors/demo/lib/data": "1"}
	rolled := map[string]string{"sensors/demo/check": printing(1), "sensors/demo/lib/data": "1", "backup/demo_2026-01-01T00:00:00/check": printing(2), "backup/demo_2026-01-01T00:00:00/lib/data": "2"}
	install := func(u *updater) error { return u.install(context.Background(), "demo", crashPackage(t)) }
	return []crash{
		{"update", one, install, []string{"1", "2"}},
		{"deploy", map[string]string{}, install, []string{"", "2"}},
		{"rollback", rolled, func(u *updater) error { return u.rollback(context.Background(), "demo") }, []string{"1", "2"}},
		{"overlay", one, func(u *updater) error {
			ask := u.change
			u.change = func(what string) error {
				if what == "rename "+u.at("demo") && !exists(u.at(oldPrefix+"demo")) {
					return syscall.EXDEV // as of a directory of the lower layer
				}
				return ask(what)
			}
			return u.install(context.Background(), "demo", crashPackage(t))
		}, []string{"1", "2"}},
		{"prune", map[string]string{
			"sensors/demo/check": printing(1), "sensors/demo/lib/data": "1",
			"backup/demo_2026-01-01T00:00:00/check": printing(1), "backup/demo_2026-01-01T00:00:00/lib/data": "1",
			"backup/demo_2026-01-02T00:00:00/check": printing(1), "backup/demo_2026-01-02T00:00:00/lib/data": "1",
			"backup/demo_2026-01-03T00:00:00/check": printing(1), "backup/demo_2026-01-03T00:00:00/lib/data": "1",
		}, install, []string{"1", "2"}},
	}
}

var errDead = errors.New("dead")

// deadAt makes every step from the n-th on fail. A removal that is stopped has
// removed something already.
func deadAt(u *updater, n int) (steps func() int) {
	count := 0
	u.change = func(what string) error {
		if count++; count < n {
			return nil
		}
		if dir, ok := strings.CutPrefix(what, "remove "); ok && count == n {
			os.Remove(filepath.Join(dir, "check"))
			os.Remove(filepath.Join(dir, "demo", "check"))
		}
		return errDead
	}
	return func() int { return count }
}

// intact checks what the agent finds after a start.
func intact(t *testing.T, u *updater, c crash, where string) {
	t.Helper()
	if left := leftovers(t, u.sensors.path, u.backup); len(left) > 0 {
		t.Errorf("%s: left %q", where, left)
	}
	whole := func(dir string) string { // the version of a complete sensor
		files := readTree(t, dir)
		for n := 1; n <= 2; n++ {
			if reflect.DeepEqual(files, map[string]string{"check": printing(n), "lib/data": strconv.Itoa(n)}) {
				return strconv.Itoa(n)
			}
		}
		return fmt.Sprintf("half: %q", files)
	}
	got := ""
	if exists(u.at("demo")) {
		got = whole(u.at("demo"))
		if _, err := u.sensors.helpText(context.Background(), "demo"); err != nil {
			t.Errorf("%s: %v", where, err)
		}
	}
	if !slices.Contains(c.outcome, got) {
		t.Errorf("%s: got %q; want one of %q", where, got, c.outcome)
	}
	backups, err := u.backups("demo")
	if err != nil {
		t.Fatal(err)
	}
	kept := make(map[string]bool)
	for _, b := range backups {
		version := whole(filepath.Join(u.backup, b))
		if kept[version] = true; version != "1" && version != "2" {
			t.Errorf("%s: backup %s is %s", where, b, version)
		}
	}
	if got == "2" && c.outcome[0] == "1" && !kept["1"] {
		t.Errorf("%s: the version before is lost", where)
	}
	if len(backups) > u.keep {
		t.Errorf("%s: %d backups", where, len(backups))
	}
}

// TestCrash stops every change dead at each of its steps, then recovery at
// each of its own, and looks at what the next start makes of it.
func TestCrash(t *testing.T) {
	other := otherFileSystem(t)
	if other == "" {
		defer t.Skip("no second file system on this machine")
	}
	points, again := 0, 0
	for _, c := range crashes(t) {
		for _, apart := range []bool{false, true} {
			if apart && other == "" {
				continue
			}
			setUp := func() *updater {
				dir := t.TempDir()
				u := testUpdater(t, dir, c.before)
				if apart {
					backup, err := os.MkdirTemp(other, "")
					if err != nil {
						t.Fatal(err)
					}
					for name, text := range c.before {
						if rest, ok := strings.CutPrefix(name, "backup/"); ok {
							writeTree(t, backup, map[string]string{rest: text})
						}
					}
					u.backup = backup
				}
				return u
			}
			where := fmt.Sprintf("%s, apart %v", c.name, apart)
			u := setUp()
			steps := deadAt(u, 1<<30)
			if err := c.run(u); err != nil {
				t.Fatalf("%s: %v", where, err)
			}
			last := c
			last.outcome = c.outcome[1:]
			intact(t, u, last, where)
			total := steps()
			for n := 1; n <= total; n++ {
				for m := 1; ; m++ { // m is the step at which recovery stops
					u := setUp()
					deadAt(u, n)
					c.run(u)
					recovery := *u
					made := deadAt(&recovery, m)
					err := recovery.recover(context.Background())
					where := fmt.Sprintf("%s, step %d of %d, recovery step %d", where, n, total, m)
					if err != nil && !errors.Is(err, errDead) {
						t.Errorf("%s: %v", where, err)
					}
					finally := *u
					finally.change = func(string) error { return nil }
					if err := finally.recover(context.Background()); err != nil {
						t.Errorf("%s: %v", where, err)
					}
					intact(t, &finally, c, where)
					again++
					if made() < m {
						break // recovery was through
					}
				}
				points++
			}
		}
	}
	for name, before := range map[string]map[string]string{ // states in which there is no directory of backups
		"1": {"sensors/.picket-old-demo/check": printing(1), "sensors/.picket-old-demo/lib/data": "1"},
		"2": {"sensors/.picket-old-demo/check": printing(1), "sensors/.picket-old-demo/lib/data": "1", "sensors/.picket-new-demo/check": printing(2), "sensors/.picket-new-demo/lib/data": "2"},
	} {
		u := testUpdater(t, t.TempDir(), before)
		if err := os.RemoveAll(u.backup); err != nil {
			t.Fatal(err)
		}
		if err := u.recover(context.Background()); err != nil {
			t.Error(err)
		}
		intact(t, u, crash{outcome: []string{name}}, "no directory of backups")
	}
	t.Logf("stopped dead at %d points, and %d times in recovery after that", points, again)
}

// TestUnsettled: what an earlier change left and could not be settled is not
// taken for this one's: nothing is lost.
func TestUnsettled(t *testing.T) {
	dir := t.TempDir()
	before := map[string]string{"sensors/demo/check": printing(2), "sensors/.picket-old-demo/check": printing(1)}
	u := testUpdater(t, dir, before)
	broken := errors.New("broken disk")
	u.change = func(what string) error {
		if what == "rename "+u.at(oldPrefix+"demo") {
			return broken
		}
		return nil
	}
	archive := packageOf(t, entry("demo/", ""), entry("demo/check", printing(3)))
	if err := u.install(context.Background(), "demo", fromBytes(archive, "")); !errors.Is(err, broken) || !strings.Contains(err.Error(), "not settled") {
		t.Errorf("got %v", err)
	}
	if got := readTree(t, dir); !reflect.DeepEqual(got, before) {
		t.Errorf("got %q; want nothing changed", got)
	}
	u.change = func(string) error { return nil }
	if err := u.install(context.Background(), "demo", fromBytes(archive, "")); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(u.at("demo", "check")); err != nil || string(got) != printing(3) {
		t.Errorf("got %q, %v", got, err)
	}
	if backups, err := u.backups("demo"); err != nil || len(backups) != 2 {
		t.Errorf("got %q, %v; want both versions before", backups, err)
	}

	// One step fails, once, at any place: an error means nothing changed.
	for n := 1; ; n++ {
		dir := t.TempDir()
		before := map[string]string{"sensors/demo/check": printing(1), "backup/demo_2026-01-01T00:00:00/check": printing(0)}
		u := testUpdater(t, dir, before)
		count := 0
		u.change = func(string) error {
			if count++; count == n {
				return broken
			}
			return nil
		}
		err := u.install(context.Background(), "demo", fromBytes(archive, ""))
		got, err2 := os.ReadFile(u.at("demo", "check"))
		if want := map[bool]string{true: printing(3), false: printing(1)}[err == nil]; string(got) != want || err2 != nil {
			t.Errorf("step %d: %v, and %q, %v is in place", n, err, got, err2)
		}
		if count < n {
			break
		}
	}
}

// TestRecoverNothing: where nothing was interrupted, nothing is written.
func TestRecoverNothing(t *testing.T) {
	dir := t.TempDir()
	u := testUpdater(t, dir, map[string]string{"sensors/demo/check": printing(1), "backup/demo_2026-01-01T00:00:00/check": printing(0), "backup/.profile": "mine"})
	if err := u.recover(context.Background()); err != nil || exists(u.at(lockName)) {
		t.Errorf("got %v; want no lock file", err)
	}
}

// TestCrashKill does so with real processes and SIGKILL.
func TestCrashKill(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	points := 0
	for i, c := range crashes(t) {
		for n := 1; ; n++ {
			dir := t.TempDir()
			u := testUpdater(t, dir, c.before)
			cmd := exec.Command(self)
			cmd.Env = append(os.Environ(), fmt.Sprintf("PICKET_TEST_CRASH=%s %d %d", dir, i, n))
			out, err := cmd.CombinedOutput()
			where := fmt.Sprintf("%s, killed at step %d", c.name, n)
			if err := u.recover(context.Background()); err != nil {
				t.Errorf("%s: %v", where, err)
			}
			intact(t, u, c, where)
			if err == nil {
				break // it was through
			}
			if !strings.Contains(err.Error(), "killed") {
				t.Fatalf("%s: %v %s", where, err, out)
			}
			points++
		}
	}
	t.Logf("killed at %d points", points)
}

// crashChild makes one change and kills itself at a step of it.
func crashChild(spec string) {
	var dir string
	var i, n int
	if _, err := fmt.Sscan(spec, &dir, &i, &n); err != nil {
		log.Fatal(err)
	}
	die := func(string) error {
		if n--; n == 0 {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	}
	if i < 0 {
		if err := editINI(dir, die, func(c *ini) error { return c.set("monitor", "url", "http://two/") }); err != nil {
			log.Fatal(err)
		}
		return
	}
	t := &testing.B{}
	u := testUpdater(t, dir, nil)
	u.change = die
	if err := crashes(t)[i].run(u); err != nil {
		log.Fatal(err)
	}
}

// TestCrashConfig kills a process at each step of saving client.cfg, which is
// all that a move writes.
func TestCrashConfig(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	points := 0
	for n := 1; ; n++ {
		file := filepath.Join(t.TempDir(), "client.cfg")
		if err := os.WriteFile(file, []byte(crashConfig), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), fmt.Sprintf("PICKET_TEST_CRASH=%s -1 %d", file, n))
		err := cmd.Run()
		want := crashConfig
		if err == nil {
			want = strings.Replace(crashConfig, "one", "two", 1)
		}
		if err := editINI(file, nil, func(*ini) error { return nil }); err != nil { // the next start
			t.Error(err)
		}
		text, err2 := os.ReadFile(file)
		left := leftovers(t, filepath.Dir(file))
		if string(text) != want || err2 != nil || len(left) > 0 {
			t.Errorf("step %d: %v: got %q, %q; want %q", n, err, text, left, want)
		}
		if err == nil {
			break
		}
		points++
	}
	if points < 4 {
		t.Errorf("killed at %d points only", points)
	}
	t.Logf("killed at %d points", points)
}

const crashConfig = "[monitor]\nurl = http://one/ ; here\n"

// TestUpdateUnderLoad: readings at full rate while their sensor is replaced a
// hundred times; none fails.
func TestUpdateUnderLoad(t *testing.T) {
	dir := t.TempDir()
	m := newRecorder(t)
	m.readings = make(chan stored, 1<<18) // received at the end
	s := testSettings(t, filepath.Join(dir, "sensors"), m.url)
	s.backup, s.concurrency = filepath.Join(dir, "backup"), 4
	script := func(n int) string { return fmt.Sprintf("#!/bin/sh\n. ./lib && echo $((n + %d))\n", n) }
	writeTree(t, dir, map[string]string{"sensors/demo/check": script(0), "sensors/demo/lib": "n=0"})
	a, c := startAgent(t, s)
	stop := make(chan struct{})
	sent := make(chan int, 1)
	go func() {
		n := 0
		for ; ; n++ {
			select {
			case <-stop:
				sent <- n
				return
			default:
			}
			if _, err := c.call(context.Background(), "cmd_submit_reading", n, "demo"); err != nil {
				t.Error(err)
			}
		}
	}()
	for i := 1; i <= 100; i++ {
		archive := packageOf(t, entry("demo/", ""), entry("demo/check", script(i)), entry("demo/lib", fmt.Sprint("n=", i)))
		if err := a.setup.Load().updater.install(context.Background(), "demo", fromBytes(archive, "")); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	n := receive(t, "the number of readings", sent)
	for i := 0; i < n; i++ {
		got := receive(t, "reading", m.readings)
		value, err := strconv.Atoi(got.value)
		if got.code != 0 || err != nil || value%2 != 0 { // odd: half of one version, half of another
			t.Errorf("got %+v", got)
		}
	}
	t.Logf("%d readings during 100 updates", n)
}

// raceDetector reports whether it is built into this binary.
func raceDetector() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// TestUpdateBesideAgent: readings at full rate while another process replaces
// their sensor; none fails.
func TestUpdateBesideAgent(t *testing.T) {
	dir := t.TempDir()
	m := newRecorder(t)
	s := testSettings(t, filepath.Join(dir, "sensors"), m.url)
	s.concurrency = 4
	writeTree(t, dir, map[string]string{
		"sensors/demo/check": printing(0), "client.cfg": "",
		"demo.tar.bz2": string(packageOf(t, entry("demo/", ""), entry("demo/check", printing(2)))),
	})
	_, c := startAgent(t, s)
	installed := make(chan error, 1)
	go func() {
		for i := 0; i < 10; i++ {
			self, err := os.Executable()
			if err == nil {
				cmd := exec.Command(self, "install", "demo.tar.bz2")
				cmd.Dir, cmd.Env = dir, append(os.Environ(), "PICKET_TEST_MAIN=1")
				var out []byte
				if out, err = cmd.CombinedOutput(); err != nil {
					err = fmt.Errorf("%w: %s", err, out)
				}
			}
			if err != nil {
				installed <- err
				return
			}
		}
		installed <- nil
	}()
	n := 0
	for busy := true; busy; n++ {
		select {
		case err := <-installed:
			busy = false
			if err != nil {
				t.Error(err)
			}
		default:
		}
		mustCall(t, c, "cmd_submit_reading", n, "demo")
		if got := receive(t, "reading", m.readings); got.code != 0 {
			t.Errorf("got %+v", got)
		}
	}
	t.Logf("%d readings during 10 updates by another process", n)
}

// largePackage makes demo.tar.bz2, of nearly 4 MiB.
func largePackage(t *testing.T, dir string) {
	t.Helper()
	body := make([]byte, 4<<20-4096) // that no compression makes smaller
	x := uint32(1)
	for i := range body {
		x = x*1664525 + 1013904223
		body[i] = byte(x >> 24)
	}
	writeTree(t, dir, map[string]string{"demo.tar.bz2": string(packageOf(t, entry("demo/", ""), entry("demo/check", printing(1)), entry("demo/data", string(body))))})
	if tool, err := exec.LookPath("bzip2"); err == nil { // else plain, which takes less memory
		body := body[:len(body)-len(body)/50] // bzip2 makes it a little larger
		writeTree(t, dir, map[string]string{"demo.tar": string(packageOf(t, entry("demo/", ""), entry("demo/check", printing(1)), entry("demo/data", string(body))))})
		if out, err := exec.Command(tool, "-f9", filepath.Join(dir, "demo.tar")).CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
}

// TestUpdateMemory measures by how much an update raises the peak of resident
// memory of a whole agent.
func TestUpdateMemory(t *testing.T) {
	dir := t.TempDir()
	packages := filepath.Join(dir, "packages")
	largePackage(t, packages)
	m := &monitor{packages: packages, stored: func(stored) error { return nil }}
	readings := make(chan stored, 10)
	m.stored = func(s stored) error { readings <- s; return nil }
	u := serve(t, newHandler(m.methods()))
	public, sign := signify(t, "keynum_1")
	archive, err := os.ReadFile(filepath.Join(packages, "demo.tar.bz2"))
	if err != nil {
		t.Fatal(err)
	}
	writeTree(t, dir, map[string]string{
		"packages/demo.tar.bz2.sig": sign(archive), "key.pub": public,
		"client.cfg": "[sensor]\npublic_key = key.pub\n[monitor]\nurl = " + u.String() + "\n[agent]\nlisten = 127.0.0.1:0\n",
	})
	cmd, c, _ := servingChild(t, dir)
	mustCall(t, c, "healthcheck") // it is up
	peak := func() int {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		kib, err := strconv.Atoi(regexp.MustCompile(`VmHWM:\s+(\d+)`).FindStringSubmatch(string(text))[1])
		if err != nil {
			t.Fatal(err)
		}
		return kib
	}
	before := peak()
	mustCall(t, c, "cmd_update_sensor_code", "demo", 2)
	if got := receive(t, "outcome", readings); got.code != 0 || got.value != "1" {
		t.Fatalf("got %+v", got)
	}
	after := peak()
	t.Logf("a package of %d KiB: peak resident set %d KiB before, %d KiB after: %+d KiB", len(archive)>>10, before, after, after-before)
	if after-before > 8<<10 && !raceDetector() { // which takes memory of its own
		t.Errorf("an update raised the peak by %d KiB; want at most 8192", after-before)
	}
}

// TestFetch decodes base64 while it arrives.
func TestFetch(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 20000)
	text := base64.StdEncoding.EncodeToString(data)
	lines := regexp.MustCompile(".{76}").ReplaceAllString(text, "$0\r\n")
	around := func(value string) string {
		return xmlDeclaration + "\n<methodResponse>\n<params><param><value>" + value + "</value></param></params></methodResponse>"
	}
	tests := []struct{ message, want string }{
		{around("<base64>" + text + "</base64>"), ""},
		{around("\n<base64>\n" + lines + "\n</base64> "), ""},
		{around("<base64></base64>"), "empty"},
		{around("<string>" + text[:100] + "</string>"), "got string; want one piece of base64"},
		{around("<base64 >" + text[:100] + "</base64>"), "got base64; want one piece of base64"},
		{around("<base64>" + text[:100] + "<!-- -->" + text[:100] + "</base64>"), "got base64; want one piece of base64"},
		{around("<array><data><value><base64>" + text + "</base64></value></data></array>"), "got array; want one piece of base64"},
		{around("<base64>" + text[:1001] + "</base64>"), "unexpected EOF"},
		{around("<base64>!" + text + "</base64>"), "illegal base64 data at input byte 0"},
		{around("<base64>" + text), "not well-formed XML: .*"},
		{"<base64>" + text + "</base64>", "<base64> where <methodResponse> belongs"},
		{string(encodeResponse(nil, faultf(7, "no"))), "fault 7: no"},
		{around("<base64>"+text+"</base64>") + strings.Repeat(" ", maxMessage), "answer longer than .*"},
	}
	for _, test := range tests {
		c := newClient(serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, test.message) })), patience, nil)
		var got bytes.Buffer
		err := c.fetch(context.Background(), &got, 1<<20, "m")
		c.close()
		switch {
		case test.want == "" && (err != nil || !bytes.Equal(got.Bytes(), data)):
			t.Errorf("%.100q: got %d bytes, %v", test.message, got.Len(), err)
		case test.want == "empty" && (err != nil || got.Len() > 0):
			t.Errorf("%.100q: got %d bytes, %v", test.message, got.Len(), err)
		case test.want != "" && test.want != "empty" && !regexp.MustCompile("^"+test.want+"$").MatchString(fmt.Sprint(err)):
			t.Errorf("%.100q: got %v; want %s", test.message, err, test.want)
		}
	}
	blanks := newClient(serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, around("<base64>"+strings.Repeat(" ", 1<<20)))
	})), patience, nil)
	if err := blanks.fetch(context.Background(), io.Discard, 1<<10, "m"); err == nil || !strings.Contains(err.Error(), "far longer") {
		t.Errorf("got %v", err)
	}
	hold := make(chan struct{})
	defer close(hold)
	c := newClient(serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, around("<base64>" + text)[:1000])
		w.(http.Flusher).Flush()
		<-hold
	})), 200*time.Millisecond, nil)
	if err := c.fetch(context.Background(), io.Discard, 1<<20, "m"); err == nil || err.Error() != "nothing has come for 200ms" {
		t.Errorf("got %v", err)
	}
}

func FuzzUnpack(f *testing.F) {
	files, _ := filepath.Glob("testdata/packages/*")
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add(packageOf(f, entry("demo/", ""), entry("demo/check", printing(1)), entry("demo/a/b/c", "d")))
	f.Add(packageOf(f, entry("demo/", ""), entry("demo/../x", "1"), entry("/demo/y", "2"), packed{Header: tar.Header{Name: "demo/link", Linkname: "/etc/passwd", Typeflag: tar.TypeSymlink}}))
	f.Add(packageOf(f, entry("demo/", ""), entry("demo/"+strings.Repeat("long", 60), "1"), packed{Header: tar.Header{Name: "demo/ü", Format: tar.FormatPAX, PAXRecords: map[string]string{"path": "demo/ü"}}}))
	f.Fuzz(func(t *testing.T, archive []byte) {
		dir := t.TempDir()
		u := testUpdater(t, filepath.Join(dir, "in"), nil)
		u.maxUnpacked = 1 << 16
		writeTree(t, u.at(stagingName), map[string]string{"package": string(archive)})
		err := u.unpack(u.at(stagingName, "package"), "demo")
		size := 0
		for name, text := range readTree(t, dir) {
			if name == "in/sensors/.picket-staging/package" {
				continue
			}
			if size += len(text); !strings.HasPrefix(name, "in/sensors/.picket-staging/demo/") {
				t.Errorf("%v: made %q", err, name)
			}
		}
		if size > 1<<16 {
			t.Errorf("%v: %d bytes unpacked", err, size)
		}
	})
}

// FuzzSignify: a key or a signature that is taken holds what was taken, and
// nothing else; and only the signature itself fits the package.
func FuzzSignify(f *testing.F) {
	message := []byte("message")
	public, sign := signify(f, "keynum_1")
	_, key, err := parseSignify([]byte(public), ed25519.PublicKeySize)
	if err != nil {
		f.Fatal(err)
	}
	_, signature, err := parseSignify([]byte(sign(message)), ed25519.SignatureSize)
	if err != nil {
		f.Fatal(err)
	}
	for _, text := range []string{public, sign(message), sign(nil), "untrusted comment: \n", ""} {
		f.Add([]byte(text), false)
		f.Add([]byte(text), true)
	}
	f.Fuzz(func(t *testing.T, text []byte, signed bool) {
		size := ed25519.PublicKeySize
		if signed {
			size = ed25519.SignatureSize
		}
		number, data, err := parseSignify(text, size)
		if err != nil {
			return
		}
		want := base64.StdEncoding.EncodeToString([]byte("Ed" + number + string(data)))
		if lines := strings.Split(string(text), "\n"); len(lines) > 3 || lines[1] != want {
			t.Errorf("%q: got %q", text, want)
		}
		if signed && ed25519.Verify(key, message, data) && !bytes.Equal(data, signature) {
			t.Errorf("%q fits as well as %q", data, signature)
		}
	})
}

// TestCommandLine runs the command lines of testdata/commands.txt.
func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	lines := cases(t, "testdata/commands.txt")
	chdir(t, dir)
	writeSensor(t, filepath.Join(dir, "sensors"), "s", `case $1 in
		options) echo "x  what x is";;
		fail) echo oops >&2; exit 4;;
		hang) kill -9 $$;;
		text) echo text;;
		*) echo 42;;
		esac`)
	stderr, err := os.Create(filepath.Join(dir, "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	defer func(before *os.File) { os.Stderr = before }(os.Stderr)
	os.Stderr = stderr
	defer log.SetOutput(log.Writer())
	empty, full := newRecorder(t), newRecorder(t)
	full.packages, full.next = dir, "http://next/"
	writeTree(t, dir, map[string]string{"s.tar.bz2": "package", "s.tar.bz2.sig": "signature"})
	fill := strings.NewReplacer("MONITOR", empty.url.String(), "FULL", full.url.String(), "TAKEN", empty.url.Host).Replace
	for _, line := range lines {
		if strings.HasSuffix(line.name, ".cfg") {
			writeTree(t, dir, map[string]string{line.name: fill(line.text)})
			continue
		}
		config := lines[0].text
		writeTree(t, dir, map[string]string{"client.cfg": config})
		args, err := splitWords(fill(line.name))
		if err != nil {
			t.Fatal(err)
		}
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], `\n`, "\n")
		}
		got := picket(args...)
		if !like(got, line.text) {
			t.Errorf("picket %s: got\n%s\nwant\n%s", line.name, got, line.text)
		}
		wantChange := line.text == "exit 0\n" // which is all that config set and unset print
		if left := readTree(t, dir)["client.cfg"]; (left != config) != wantChange {
			t.Errorf("picket %s: left %q", line.name, left)
		}
	}
	if text := readTree(t, dir)["stderr"]; text != "oops\n" {
		t.Errorf("got %q; want what the sensor says", text)
	}
	if err := os.Remove("client.cfg"); err != nil {
		t.Fatal(err)
	}
	want := "exit 2\npicket: no client.cfg: looked for " + filepath.Join(dir, "client.cfg") + ", then /…\n"
	if got := picket("list"); !like(got, want) {
		t.Errorf("got %q; want %q", got, want)
	}
}

// picket runs a command line in this process. It returns "exit CODE", what is
// printed, and the error as it would be logged.
func picket(args ...string) string {
	var out bytes.Buffer
	err := execute(context.Background(), nil, args, &out)
	code := 0
	var coded *exitError
	switch {
	case errors.As(err, &coded):
		code, err = coded.code, coded.err
	case err != nil:
		code = exitFailed
	}
	if err != nil {
		fmt.Fprintf(&out, "picket: %v\n", err)
	}
	return fmt.Sprintf("exit %d\n%s", code, &out)
}

// like reports whether got is want, in which … stands for any text.
func like(got, want string) bool {
	pattern := strings.ReplaceAll(regexp.QuoteMeta(want), "…", ".*")
	return regexp.MustCompile("(?s)^" + pattern + "$").MatchString(got)
}

func TestWireValue(t *testing.T) {
	for arg, want := range map[string]any{
		"7": 7, "-7": -7, "2147483647": 2147483647, "2147483648": int64(2147483648),
		"9223372036854775808": "9223372036854775808", "1.5": "1.5", "": "", "7x": "7x",
	} {
		if got := wireValue(arg); got != want {
			t.Errorf("%q: got %#v; want %#v", arg, got, want)
		}
	}
}

func TestReadable(t *testing.T) {
	v := map[string]any{
		"a": []any{1, "x\ny", []any{nil, true}}, "b": map[string]any{},
		"c": []byte("hi"), "d": dateTime("20261122T20:43:21"), "e": 2.5,
	}
	want := "a:\n  - 1\n  - x\n    y\n  - - nil\n    - true\nb: \nc: aGk=\nd: 20261122T20:43:21\ne: 2.5"
	if got := readable(v); got != want {
		t.Errorf("got %q; want %q", got, want)
	}
}

// TestMonitorStores: the stand-in monitor takes a reading in one form only.
func TestMonitorStores(t *testing.T) {
	m := newRecorder(t)
	c := newClient(m.url, patience, nil)
	defer c.close()
	at := dateTime("20261122T20:43:21")
	mustCall(t, c, "cmd_store_probe_data", 1, []any{0, "1"}, at)
	for _, params := range [][]any{
		{1, []any{0, 0.5}, at}, {1, []any{0, "1"}, string(at)}, {1, []any{0, "1"}}, {1.5, []any{0, "1"}, at},
	} {
		wantFault(t, c, "cmd_store_probe_data", params...)
	}
}

// wantFault wants a method to refuse its parameters.
func wantFault(t testing.TB, c *client, method string, params ...any) {
	t.Helper()
	v, err := c.call(context.Background(), method, params...)
	if f := (*fault)(nil); !errors.As(err, &f) || f.code != faultParams {
		t.Errorf("%s%.80v: got %v, %v; want fault %d", method, params, v, err, faultParams)
	}
}

// TestSelftest: it passes with what is shipped and without a client.cfg, and fails
// where a sensor does, but not where a sensor gives a reason.
func TestSelftest(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	run := func(want ...string) {
		t.Helper()
		got := picket("selftest")
		for _, want := range want {
			if !like(got, want) {
				t.Errorf("got %s; want %s", got, want)
			}
		}
	}
	t.Run("shipped", func(t *testing.T) {
		files := shipped(t, "")
		dir := t.TempDir()
		writeTree(t, dir, files)
		chdir(t, dir)
		run("exit 0\n…\nselftest passed\n", "…disk         percent /           0  …")
	})
	dir := t.TempDir()
	chdir(t, dir)
	run("exit 0\n…\nselftest passed\n")
	if got := picket("selftest"); strings.Count(got, "\n") != 1+15 {
		t.Errorf("got %s; want no sensors but its own", got)
	}
	option := "#!/bin/sh\n[ $1 = options ] && echo x && exit; "
	writeTree(t, dir, map[string]string{
		"client.cfg": "", "sensors/died/check": option + "echo no y here >&2; exit 255",
		"sensors/none/check": option + "echo no x here >&2; exit 1", "sensors/broken/check": option + "echo x",
	})
	run("exit 1\n…1 thing not as it should be\n", `…not counted: "no x here"…`, "…FAILED: not a number…")
	writeTree(t, dir, map[string]string{"sensors/mute/check": "#!/bin/sh\nexit 1"})
	run("exit 1\n…2 things not as it should be\n", "…mute         FAILED: no help: mute options: exit 1…")
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A testCA signs certificates for tests.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newCA(t testing.TB, name string) *testCA {
	t.Helper()
	ca := &testCA{cert: &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}}
	ca.cert.Subject.CommonName = name
	ca.pem, _ = ca.sign(t, ca.cert, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	return ca
}

// sign returns a certificate and its key as PEM. The first is the CA's own.
func (ca *testCA) sign(t testing.TB, cert *x509.Certificate, from, to time.Time) (certPEM, keyPEM string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if ca.key == nil {
		ca.key = key
	}
	cert.SerialNumber, cert.NotBefore, cert.NotAfter = big.NewInt(time.Now().UnixNano()), from, to
	der, err := x509.CreateCertificate(rand.Reader, cert, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return encode("CERTIFICATE", der), encode("EC PRIVATE KEY", keyDER)
}

// files writes a certificate that is valid between two times, its key and the
// CA's certificate, and returns what a section says of them.
func (ca *testCA) files(t testing.TB, name string, from, to time.Time) tlsFiles {
	t.Helper()
	dir := t.TempDir()
	cert, key := ca.sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
	}, from, to)
	writeTree(t, dir, map[string]string{"crt": cert, "key": key, "ca": ca.pem})
	f := tlsFiles{certificate: filepath.Join(dir, "crt"), key: filepath.Join(dir, "key"), ca: filepath.Join(dir, "ca")}
	if option, err := f.load(); err != nil {
		t.Fatal(option, err)
	}
	return f
}

// valid is files of a certificate that is valid now.
func (ca *testCA) valid(t testing.TB, name string) tlsFiles {
	t.Helper()
	return ca.files(t, name, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
}

// serveTLS serves the methods of a monitor to whom the files let in.
func serveTLS(t testing.TB, m *monitor, files tlsFiles) (*handler, *url.URL) {
	h := newHandler(m.methods())
	h.setAccess(&access{tls: serverTLS(files)})
	u := serve(t, h)
	u.Scheme = "https"
	return h, u
}

// TestTLS: whom the agent is served by and whom it serves, over TLS.
func TestTLS(t *testing.T) {
	hour, now := time.Hour, time.Now()
	ours, theirs := newCA(t, "ours"), newCA(t, "theirs")
	box, monitorFiles := ours.valid(t, "box"), ours.valid(t, "monitor")
	alone := box // without mutual TLS
	alone.ca, alone.pool = "", nil
	pinned := box
	pinned.name = "monitor"
	none := monitorFiles // a caller without a certificate
	none.pair = nil
	at := func(clock, built time.Time) func(*tls.Config) {
		return func(c *tls.Config) { c.Time = func() time.Time { return certificateTime(clock, built) } }
	}
	plain := func(*tls.Config) {}
	trusting := func(c *tls.Config) { c.RootCAs = box.pool }
	old := func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS11, tls.VersionTLS11 }
	const invalid = "expired or is not yet valid"
	for _, test := range []struct {
		name           string
		server, client tlsFiles
		change         func(client *tls.Config)
		want           string // a regular expression of the error; "" is success
	}{
		{"mutual", box, monitorFiles, plain, ""},
		{"one-sided", alone, none, plain, ""},
		{"pinned", pinned, monitorFiles, plain, ""},
		{"pinned to another", pinned, ours.valid(t, "somebody"), plain, "certificate"},
		{"wrong CA of the server", theirs.valid(t, "box"), monitorFiles, plain, "unknown authority"},
		{"not of the system's CAs", alone, tlsFiles{}, plain, "unknown authority"},
		{"wrong CA of the client", box, theirs.valid(t, "monitor"), trusting, "certificate"},
		{"no client certificate", box, none, plain, "certificate"},
		{"wrong name", alone, none, func(c *tls.Config) { c.ServerName = "elsewhere" }, "not elsewhere|valid for"},
		{"server expired", ours.files(t, "box", now.Add(-2*hour), now.Add(-hour)), monitorFiles, plain, invalid},
		{"server not valid yet", ours.files(t, "box", now.Add(hour), now.Add(2*hour)), monitorFiles, plain, invalid},
		{"client expired", box, ours.files(t, "monitor", now.Add(-2*hour), now.Add(-hour)), plain, "certificate"},
		{"clock in 1970", alone, none, at(time.Unix(300, 0), now), ""},
		{"clock in 1970, built before", alone, none, at(time.Unix(300, 0), now.Add(-2*hour)), "not yet valid"},
		{"expired once the clock is right", alone, none, at(now.Add(2*hour), now), "expired"},
		{"TLS 1.1", alone, none, old, "protocol version"},
		{"TLS 1.2", box, monitorFiles, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, ""},
	} {
		_, u := serveTLS(t, &monitor{}, test.server)
		config := clientTLS(test.client)
		test.change(config)
		c := newClient(u, patience, config)
		v, err := c.call(context.Background(), "healthcheck")
		c.close()
		failed := err != nil && test.want != "" && regexp.MustCompile(test.want).MatchString(err.Error())
		if succeeded := err == nil && test.want == "" && v == "OK"; !failed && !succeeded {
			t.Errorf("%s: got %v, %v; want %q", test.name, v, err, test.want)
		}
	}
	_, u := serveTLS(t, &monitor{}, box)
	u.Scheme = "http"
	c := newClient(u, patience, nil)
	defer c.close()
	if _, err := c.call(context.Background(), "healthcheck"); err == nil || !strings.Contains(err.Error(), "400") {
		t.Errorf("plain HTTP on the TLS port: got %v", err)
	}
}

// TestTLSReplaced: whoever has a certificate of a CA that was replaced is served
// no more, also over a connection or session that he has.
func TestTLSReplaced(t *testing.T) {
	ours, theirs := newCA(t, "ours"), newCA(t, "theirs")
	box := ours.valid(t, "box")
	h, u := serveTLS(t, &monitor{}, box)
	config := clientTLS(ours.valid(t, "monitor"))
	config.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	c := newClient(u, patience, config)
	defer c.close()
	c.idle = patience
	mustCall(t, c, "healthcheck")
	box.pool = theirs.valid(t, "x").pool
	h.setAccess(&access{tls: serverTLS(box)})
	if v, err := c.call(context.Background(), "healthcheck"); err == nil {
		t.Errorf("got %v", v)
	}
	other := theirs.valid(t, "monitor")
	other.pool = ours.valid(t, "x").pool
	c2 := newClient(u, patience, clientTLS(other))
	defer c2.close()
	mustCall(t, c2, "healthcheck")
}

// TestBuildTime: the linker's stamp is the time of the build.
func TestBuildTime(t *testing.T) {
	defer func(before string) { built = before }(built)
	if built = "1790000000"; !buildTime().Equal(time.Unix(1790000000, 0)) {
		t.Errorf("got %v", buildTime())
	}
}

// A box is a directory with a client.cfg, a monitor that records, and a client
// that commands the agent which box.run or box.start runs there.
type box struct {
	*recorder
	dir    string
	config string // the text of client.cfg
	client *client
}

// newBox makes a box with these files. Its client.cfg names the monitor, has an
// address to listen at, and then more.
func newBox(t testing.TB, more string, files map[string]string) *box {
	t.Helper()
	b := &box{recorder: newRecorder(t), dir: t.TempDir()}
	b.config = "[monitor]\nurl = " + b.url.String() + "\n[agent]\nlisten = 127.0.0.1:0\n" + more
	writeTree(t, b.dir, files)
	writeTree(t, b.dir, map[string]string{"client.cfg": b.config})
	return b
}

// run runs the agent in this process until the test ends.
func (b *box) run(t testing.TB) *agent {
	t.Helper()
	s, err := loadSettings(filepath.Join(b.dir, "client.cfg"))
	if err != nil {
		t.Fatal(err)
	}
	var a *agent
	a, b.client = startAgent(t, s)
	return a
}

// start runs the agent as a child.
func (b *box) start(t testing.TB, args ...string) (p *child) {
	t.Helper()
	p, b.client, _ = servingChild(t, b.dir, args...)
	return p
}

// ask gives a command that has a ticket, and returns what the monitor gets.
func (b *box) ask(t testing.TB, method string, params ...any) stored {
	t.Helper()
	mustCall(t, b.client, method, params...)
	return receive(t, "the outcome of "+method, b.readings)
}

// read runs a sensor without arguments.
func (b *box) read(t testing.TB, ticket any, sensor string) stored {
	t.Helper()
	return b.ask(t, "cmd_submit_reading", ticket, sensor)
}

// wants compares what the monitor gets: "ticket 7: exit 0, value 1".
func wants(t testing.TB, got stored, want string) {
	t.Helper()
	if text := got.String(); !strings.HasSuffix(text, " 127.0.0.1 "+want) {
		t.Errorf("got %s; want %s", text, want)
	}
}

// wantLog waits until a log has a text, in which … stands for anything.
func wantLog(t testing.TB, log fmt.Stringer, text string) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("the log is %s", log)
		}
	}()
	await(t, "the log has "+text, func() bool { return like(log.String(), "…"+text+"…") })
}

// A child is a program that runs as a child of the test, and its log.
type child struct {
	*exec.Cmd
	log    lockedBuffer
	serves chan string   // gets each line of the log that names the address where it serves
	ended  chan struct{} // is closed when it has ended
}

// servesAt matches the line with which a program says where it serves.
var servesAt = regexp.MustCompile(`(?:on|listening) (?:http://)?(127\.0\.0\.1:\d+)[,/]`)

// start starts a program and kills it when the test ends.
func start(t testing.TB, cmd *exec.Cmd) *child {
	t.Helper()
	c := &child{Cmd: cmd, serves: make(chan string, 100), ended: make(chan struct{})}
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(c.ended)
		defer close(c.serves)
		var err error
		for lines := bufio.NewReader(stderr); err == nil; {
			var line string
			line, err = lines.ReadString('\n')
			c.log.Write([]byte(line))
			if servesAt.MatchString(line) {
				c.serves <- line
			}
		}
		c.Wait() // whose error is in ProcessState
	}()
	t.Cleanup(func() { c.Process.Kill(); <-c.ended })
	return c
}

// client waits until an agent serves, and returns a client that calls it.
func (c *child) client(t testing.TB) *client {
	t.Helper()
	return clientOf(t, c.address(t))
}

// address waits until the program serves, and returns where.
func (c *child) address(t testing.TB) string {
	t.Helper()
	line := receive(t, "its address", c.serves)
	if line == "" {
		t.Fatalf("%s does not serve: %s", c.Path, &c.log)
	}
	return servesAt.FindStringSubmatch(line)[1]
}

// clientOf returns a client of an agent at this address.
func clientOf(t testing.TB, address string) *client {
	c := newClient(&url.URL{Scheme: "http", Host: address, Path: "/"}, patience, nil)
	t.Cleanup(c.close)
	return c
}

// signal sends signals.
func (c *child) signal(t testing.TB, signals ...syscall.Signal) {
	t.Helper()
	for _, s := range signals {
		if err := c.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
}

// wait waits for the end and returns the exit code, -1 for a signal.
func (c *child) wait(t testing.TB) int {
	t.Helper()
	receive(t, "the end of "+c.Path, c.ended)
	return c.ProcessState.ExitCode()
}

// terminate ends an agent, which must succeed.
func (c *child) terminate(t testing.TB) {
	t.Helper()
	c.signal(t, syscall.SIGTERM)
	if code := c.wait(t); code != 0 {
		t.Errorf("exit %d; want 0: %s", code, &c.log)
	}
}

// self is the command that runs this program in dir.
func self(t testing.TB, dir string, args ...string) *exec.Cmd {
	t.Helper()
	file, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(file, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "PICKET_TEST_MAIN=1")
	return cmd
}

// wrapped is a command that another one starts: its path and arguments follow.
func wrapped(cmd *exec.Cmd, name string, args ...string) *exec.Cmd {
	outer := exec.Command(name, append(append(args, cmd.Path), cmd.Args[1:]...)...)
	outer.Dir, outer.Env = cmd.Dir, cmd.Env
	return outer
}

// servingChild starts this program in dir and waits until it takes commands. The
// buffer gets what it logs.
func servingChild(t testing.TB, dir string, args ...string) (*child, *client, *lockedBuffer) {
	t.Helper()
	c := start(t, self(t, dir, args...))
	return c, c.client(t), &c.log
}

// build builds the program as make build does, and returns its path in dir.
func build(t testing.TB, dir string) string {
	t.Helper()
	return goBuild(t, filepath.Join(dir, "picket"), ".")
}

func goBuild(t testing.TB, file, source string) string {
	t.Helper()
	flags := []string{"build", "-trimpath", "-buildvcs=false", "-tags", "nethttpomithttp2"}
	linker := "-s -w -buildid= -X main.built=1 -X main.release=test"
	cmd := exec.Command("go", append(flags, "-ldflags", linker, "-o", file, source)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return file
}

// TestReload: what is valid in client.cfg is in force as a whole, what is not
// changes nothing; the work goes on meanwhile.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	gate, gated := gatedSensor(dir)
	b := newBox(t, "[sensor]\npath = one\n", map[string]string{
		"one/s/check": printing(1), "two/s/check": printing(2), "one/gated/check": gated,
	})
	first, second := b.recorder, newRecorder(t)
	p := b.start(t)
	before := b.client.url.Host
	reloads := 0
	reload := func(format string, args ...any) {
		t.Helper()
		reloads++
		writeTree(t, b.dir, map[string]string{"client.cfg": fmt.Sprintf(format, args...)})
		p.signal(t, syscall.SIGHUP)
		await(t, "the reload", func() bool {
			log := p.log.String()
			return strings.Count(log, "is in force; on")+strings.Count(log, "the settings before stay in force") == reloads
		})
	}
	mustCall(t, b.client, "cmd_submit_reading", 1, "gated")
	wants(t, b.read(t, 2, "s"), "ticket 2: exit 0, value 1")
	first.set(away)
	mustCall(t, b.client, "cmd_submit_reading", 3, "s")
	await(t, "a try to deliver it", func() bool { return first.tries.Load() > 1 })

	reload("[sensor]\npth = two\ntimeout = x\n")
	wantLog(t, &p.log, `reload: …client.cfg:3: [sensor] timeout: "x" is not a time`)
	reload("x\n")
	wantLog(t, &p.log, `reload: …client.cfg:1: no section header yet: "x"`)
	reload("[sensor]\npath = two\n[agent]\nlisten = 203.0.113.1:1\n") // an address of nobody here
	wantLog(t, &p.log, "reload: [agent] listen: listen tcp 203.0.113.1:1: ")
	mustCall(t, b.client, "cmd_submit_reading", 4, "s") // of path one, still

	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	free.Close()
	settings := "[sensor]\npath = two\nconcurrency = 3\n[monitor]\nurl = %s\n[agent]\nallow = 127.0.0.1\nlisten = %s\n"
	reload(settings, second.url, address)
	tickets := map[any]string{}
	for range [2]int{} {
		got := receive(t, "what was undelivered", second.readings)
		tickets[got.ticket] = got.value
	}
	if want := (map[any]string{3: "1", 4: "1"}); !maps.Equal(tickets, want) {
		t.Errorf("got %v; want %v", tickets, want)
	}
	if conn, err := net.Dial("tcp", before); err == nil {
		conn.Close()
		t.Errorf("%s is still served", before)
	}
	b.client, b.recorder = p.client(t), second
	wants(t, b.read(t, 5, "s"), "ticket 5: exit 0, value 2")
	writeTree(t, dir, map[string]string{"gate": ""})
	await(t, gate, func() bool { return len(second.readings) > 0 })
	wants(t, receive(t, "the sensor that ran all the while", second.readings), "ticket 1: exit 0, value 3")
	// The same port, of all addresses: the old one is in the way.
	_, port, _ := net.SplitHostPort(address)
	reload(settings, second.url, ":"+port)
	mustCall(t, b.client, "healthcheck")
}

// gatedSensor returns a sensor that prints 3 as soon as the file dir/gate exists.
func gatedSensor(dir string) (gate, sensor string) {
	gate = filepath.Join(dir, "gate")
	return gate, "#!/bin/sh\nwhile [ ! -e '" + gate + "' ]; do sleep 0.02; done; echo 3\n"
}

// TestHealth: the agent is a sensor itself, and logs all of it at SIGUSR1.
func TestHealth(t *testing.T) {
	b := newBox(t, "", nil)
	p := b.start(t)
	asked := 0
	ask := func(args ...any) stored { asked++; return b.ask(t, "cmd_submit_reading", 1, "picket", args) }
	wants(t, ask("last_delivery_age"), "ticket 1: exit 1, value nan")
	p.signal(t, syscall.SIGUSR1)
	wantLog(t, &p.log, "health: … last_delivery_age …\n")
	line := regexp.MustCompile(`health: (.*)\n`).FindStringSubmatch(p.log.String())[1]
	want := `^uptime \d+ queued 0 running 0 undelivered [01] delivered [01] dropped 0 refused 0 ` +
		`rss_kb \d{4,} spool_bytes 0 last_delivery_age (\d+|-)$`
	if !regexp.MustCompile(want).MatchString(line) {
		t.Errorf("got %s; want %s", line, want)
	}
	names := strings.Fields(line)
	for i := 0; i < len(names); i += 2 {
		got := ask(names[i])
		if _, err := strconv.ParseUint(got.value, 10, 64); err != nil || got.code != 0 {
			t.Errorf("%s: got %+v", names[i], got)
		}
	}
	await(t, "all are counted", func() bool { asked++; return b.health(t, "delivered") == fmt.Sprint(asked-1) })
}

// TestLog: nobody waits for whoever reads the log. What he does not take is
// counted.
func TestLog(t *testing.T) {
	b := newBox(t, "[agent]\nqueue = 1000\n", nil)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := self(t, b.dir)
	cmd.Stderr = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	log := bufio.NewReader(r)
	line, err := log.ReadString('\n')
	match := servesAt.FindStringSubmatch(line)
	if match == nil {
		t.Fatalf("got %q, %v", line, err)
	}
	b.client = clientOf(t, match[1])
	const commands = 450 // two lines each, together fewer than are logged in one go
	for i := 0; i < commands; i++ {
		b.read(t, i, fmt.Sprintf("%0200d", i))
	}
	rest := make(chan string)
	go func() {
		text, _ := io.ReadAll(log)
		rest <- string(text)
	}()
	cmd.Process.Signal(syscall.SIGTERM)
	text := receive(t, "the end of the log", rest)
	lines, lost := strings.Count(text, "\n"), 0
	for _, match := range regexp.MustCompile(`picket: (\d+) lines? of the log lost`).FindAllStringSubmatch(text, -1) {
		n, _ := strconv.Atoi(match[1])
		lost, lines = lost+n, lines-1
	}
	const more = 5 // at most, of the start and the end
	if n := lost + lines; lost == 0 || n < 2*commands || n > 2*commands+more {
		t.Errorf("%d lines and %d lost; want %d and a few", lines, lost, 2*commands)
	}
}

// TestSyslog: each line goes to the local syslog with its severity, and to
// standard error while there is none. Nobody waits for one that takes nothing.
func TestSyslog(t *testing.T) {
	program(t, "unshare")
	if os.Geteuid() != 0 {
		t.Skip("not root")
	}
	b := newBox(t, "log = syslog\n", map[string]string{"dev/null": "", "sensors/s/check": printing(1)})
	script := `mount --bind /dev/null dev/null && mount --rbind dev /dev && exec "$1"` // a /dev/log of its own
	p := start(t, wrapped(self(t, b.dir), "unshare", "--mount", "sh", "-c", script, "sh"))
	b.client = p.client(t)
	wantLog(t, &p.log, "syslog: ")
	b.read(t, 1, "s")
	wantLog(t, &p.log, "picket: command cmd_submit_reading … ticket 1")
	l, err := net.ListenPacket("unixgram", filepath.Join(b.dir, "dev/log"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	next := func() string {
		buf := make([]byte, 1000)
		l.SetReadDeadline(time.Now().Add(patience))
		n, _, err := l.ReadFrom(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	await(t, "a line in syslog", func() bool { // syslog may be looked for only now and then
		p.signal(t, syscall.SIGUSR1)
		l.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, _, _ := l.ReadFrom(make([]byte, 1000))
		return n > 0
	})
	has := func(want string) {
		t.Helper()
		pattern := regexp.MustCompile(want)
		for line := next(); !pattern.MatchString(line); line = next() {
		}
	}
	b.read(t, 2, "s")
	has(`^<30>.* picket\[\d+\]: command cmd_submit_reading .*ticket 2`)
	p.signal(t, syscall.SIGUSR1)
	has(`^<29>.* picket\[\d+\]: health: `)
	writeTree(t, b.dir, map[string]string{"client.cfg": b.config + "[agent]\nlog = syslog\nlgo = x\n"})
	p.signal(t, syscall.SIGHUP)
	has(`^<28>.*: .*unknown option "lgo"`)
	writeTree(t, b.dir, map[string]string{"client.cfg": b.config + "[agent]\nqueue = x\n"})
	p.signal(t, syscall.SIGHUP)
	has(`^<27>.*: reload: .*queue`)
	if strings.Contains(p.log.String(), "ticket 2") {
		t.Errorf("on standard error: %s", &p.log)
	}
	for i := 0; i < 600; i++ { // more lines than the socket and the agent keep
		b.read(t, i, "picket")
	}
	l.Close()
	p.terminate(t)
}

// TestStoryTLS follows the README: it makes the certificates with openssl,
// and has an agent and a stand-in monitor trust only each other.
func TestStoryTLS(t *testing.T) {
	program(t, "openssl")
	blocks := readmeBlocks(t, "TLS")
	if n := strings.Count(blocks[0], "openssl "); n != 5 {
		t.Errorf("%d commands; want 5", n)
	}
	dir := t.TempDir()
	cmd := exec.Command("sh", "-e", "-c", blocks[0])
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("this openssl cannot: %v\n%s", err, out)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	files := tlsFiles{certificate: path("monitor.crt"), key: path("monitor.key"), ca: path("ca.crt")}
	if option, err := files.load(); err != nil {
		t.Fatal(option, err)
	}
	m := newRecorder(t)
	_, u := serveTLS(t, m.monitor, files)
	config := strings.Replace(blocks[1], "https://monitor:8081/", "https://localhost:"+u.Port()+"/", 1)
	writeTree(t, dir, map[string]string{"client.cfg": config + "\nlisten = 127.0.0.1:0\n", "sensors/s/check": printing(1)})
	_, plain, _ := servingChild(t, dir)
	_, port, _ := net.SplitHostPort(plain.url.Host)
	call := func(flags ...string) string {
		args := append(append([]string{"call"}, flags...), "https://localhost:"+port+"/")
		return picket(append(args, "cmd_submit_reading", "7", "s")...)
	}
	if got := call("-cert", files.certificate, "-key", files.key, "-ca", files.ca); got != "exit 0\nOK\n" {
		t.Fatal(got)
	}
	wants(t, receive(t, "reading", m.readings), "ticket 7: exit 0, value 1")
	notOurs := []string{"-ca", files.ca, "-cert", path("box.crt"), "-key", path("box.key")}
	for _, flags := range [][]string{{"-ca", files.ca}, notOurs, {}} {
		if got := call(flags...); !strings.HasPrefix(got, "exit 1\n") {
			t.Errorf("%v: got %s", flags, got)
		}
	}
	if _, err := plain.call(context.Background(), "healthcheck"); err == nil {
		t.Error("plain HTTP: no error")
	}
}

// readmeBlocks returns the code blocks of a section of the README.
func readmeBlocks(t *testing.T, section string) (blocks []string) {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(readme), "\n## "+section+"\n")
	text, _, _ = strings.Cut(text, "\n## ")
	for i, block := range strings.Split(text, "\n```\n") {
		if i%2 == 1 {
			blocks = append(blocks, block)
		}
	}
	return blocks
}

// TestStoryPassword: the password of the monitor's URL is in no log and in no
// output, wherever in client.cfg or on the command line it stands.
func TestStoryPassword(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "client.cfg")
	var configs, commands []string
	for _, c := range cases(t, "testdata/passwords.txt") {
		lines := strings.Split(strings.TrimSpace(c.text), "\n")
		if c.name == "commands" {
			commands = lines
			continue
		}
		for _, line := range lines {
			configs = append(configs, strings.TrimSpace(c.name+"\n"+line))
		}
	}
	for _, config := range configs {
		lines := logged(t)
		writeTree(t, dir, map[string]string{"client.cfg": config + "\n", "sensors/s/check": printing(1)})
		for _, command := range commands {
			got := picket(append([]string{"-c", file}, strings.Fields(command)...)...)
			if regexp.MustCompile("geheim|geh%|eim@").MatchString(got + lines.String()) {
				t.Errorf("%q: %s: got %s%s", config, command, got, lines)
			}
		}
	}
}

// TestStories runs the stories of testdata/stories.txt.
func TestStories(t *testing.T) {
	for _, story := range cases(t, "testdata/stories.txt") {
		t.Run(story.name, func(t *testing.T) {
			log := logged(t)
			more, files := "", map[string]string{"packages/": ""}
			lines := strings.Split(strings.TrimSpace(story.text), "\n")
			for ; ; lines = lines[1:] {
				kind, rest, _ := strings.Cut(lines[0], " ")
				name, script, _ := strings.Cut(rest, ": ")
				switch script = "#!/bin/sh\n" + script + "\n"; kind {
				case "sensor":
					files["sensors/"+name+"/check"] = script
					continue
				case "package":
					files["packages/"+name+".tar.bz2"] = string(packageOf(t, entry(name+"/", ""), entry(name+"/check", script)))
					continue
				case "option":
					more += strings.Replace(rest, " ", "\n", 1) + "\n"
					continue
				}
				break
			}
			b := newBox(t, more, files)
			b.packages = filepath.Join(b.dir, "packages")
			b.run(t)
			var err error
			for _, line := range lines {
				want, follows := strings.CutPrefix(line, "\t")
				switch text, ofLog := strings.CutPrefix(want, "log "); {
				case ofLog:
					wantLog(t, log, text+"\n")
				case strings.HasPrefix(want, "fault "):
					if !strings.HasPrefix(fmt.Sprint(err), want+": ") {
						t.Errorf("got %v; want %s", err, want)
					}
				case follows:
					wants(t, receive(t, want, b.readings), want)
				default:
					method, params, _ := strings.Cut(line, " ")
					_, err = b.client.call(context.Background(), method, fromJSON(t, params)...)
				}
			}
		})
	}
}

// fromJSON returns the elements of an array in JSON, whole numbers as int or i8.
func fromJSON(t *testing.T, text string) []any {
	t.Helper()
	var list []any
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&list); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	var walk func(list []any)
	walk = func(list []any) {
		for i, v := range list {
			switch v := v.(type) {
			case json.Number:
				if list[i] = wireValue(string(v)); strings.Contains(string(v), ".") {
					list[i], _ = v.Float64()
				}
			case []any:
				walk(v)
			}
		}
	}
	walk(list)
	return list
}

// TestStory: what is acknowledged is stored once, whichever way it is asked for,
// and then nothing is left.
func TestStory(t *testing.T) {
	b := newBox(t, "", map[string]string{
		"sensors/words/check": "#!/bin/sh\necho $#", "sensors/fail/check": "#!/bin/sh\necho broken >&2; exit 2",
	})
	b.run(t)
	wantFault(t, b.client, "cmd_submit_reading", strings.Repeat("x", maxTicket+1), "words")
	helps := map[string]any{"picket": ownHelp(), "words": "1", "fail": `no help: fail options: exit 2: "broken"`}
	if got := mustCall(t, b.client, "cmd_list_sensors"); !reflect.DeepEqual(got, helps) {
		t.Errorf("got %v; want %v", got, helps)
	}
	calls := []any{}
	for i := 0; i < 20; i++ {
		calls = append(calls, map[string]any{"methodName": "cmd_submit_reading", "params": []any{i, "words"}})
	}
	if got := mustCall(t, b.client, "system.multicall", calls).([]any); len(got) != 20 {
		t.Errorf("got %v", got)
	}
	seen := make(map[any]int)
	for range calls {
		seen[receive(t, "reading", b.readings).ticket]++
	}
	if len(seen) != 20 || len(b.readings) != 0 {
		t.Errorf("got %v and %d more; want each of 20 once", seen, len(b.readings))
	}
	await(t, "nothing is left", func() bool {
		return b.health(t, "queued") == "0" && b.health(t, "running") == "0" && b.health(t, "undelivered") == "0"
	})
}

// health asks the agent for a figure of its own.
func (b *box) health(t testing.TB, name string) string {
	t.Helper()
	return b.ask(t, "cmd_submit_reading", "health", "picket", name).value
}

// TestStoryQueueFull: a full queue makes the dispatcher wait, not fail.
func TestStoryQueueFull(t *testing.T) {
	lines := logged(t)
	dir := t.TempDir()
	_, gated := gatedSensor(dir)
	b := newBox(t, "queue = 1\n[sensor]\nconcurrency = 1\n", map[string]string{"sensors/gated/check": gated})
	b.run(t)
	mustCall(t, b.client, "cmd_submit_reading", 1, "gated")
	mustCall(t, b.client, "cmd_submit_reading", 2, "gated")
	waited := make(chan error, 1)
	go func() {
		_, err := b.client.call(context.Background(), "cmd_submit_reading", 3, "gated")
		waited <- err
	}()
	wantLog(t, lines, "ticket 3, sensor gated")
	writeTree(t, dir, map[string]string{"gate": ""})
	if err := receive(t, "room", waited); err != nil {
		t.Error(err)
	}
	for ticket := 1; ticket <= 3; ticket++ {
		wants(t, receive(t, "reading", b.readings), fmt.Sprintf("ticket %d: exit 0, value 3", ticket))
	}
}

// TestStoryHanging: sensors that hang make a dispatcher slower, but none of his
// tickets is refused, however long his list.
func TestStoryHanging(t *testing.T) {
	hang := "#!/bin/sh\nsleep 60"
	b := newBox(t, "[sensor]\ntimeout = 200ms\n", map[string]string{"sensors/one/check": hang, "sensors/two/check": hang})
	b.run(t)
	sensors := [20]string{"one", "two"}
	const n = 330 // more than running and waiting ones together
	for i := 0; i < n; i++ {
		if sensor := sensors[i%20]; sensor != "" {
			mustCall(t, b.client, "cmd_submit_reading", i, sensor)
		} else {
			mustCall(t, b.client, "cmd_submit_reading", i, "picket", "uptime")
		}
	}
	seen := make(map[any]bool)
	for len(seen) < n {
		got := receive(t, "reading", b.readings)
		want := 0
		if sensors[got.ticket.(int)%20] != "" {
			want = -15
		}
		if got.code != want || seen[got.ticket] {
			t.Errorf("got %+v; want exit %d, once", got, want)
		}
		seen[got.ticket] = true
	}
}

// TestStoryTerm: SIGTERM ends the process with code 0, and every ticket that
// was acknowledged has its reading.
func TestStoryTerm(t *testing.T) {
	word := mark(t)
	dir := t.TempDir()
	_, gated := gatedSensor(dir)
	b := newBox(t, "[sensor]\nconcurrency = 2\n", map[string]string{
		"sensors/gated/check": strings.Replace(gated, "while", "sleep 300 & while", 1),
		"sensors/a/check":     "#!/bin/sh\ntrap '' TERM; echo >../asked; sleep 300",
	})
	p := b.start(t)
	go b.client.call(context.Background(), "cmd_list_sensors") // asks a sensor that does not want to end
	await(t, "the listing", func() bool { return readTree(t, b.dir)["sensors/asked"] != "" })
	for i := 1; i <= 4; i++ {
		mustCall(t, b.client, "cmd_submit_reading", i, "gated")
	}
	p.signal(t, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGTERM) // only the second one ends it
	wantLog(t, &p.log, "picket: ending\n")
	writeTree(t, dir, map[string]string{"gate": ""})
	if code := p.wait(t); code != 0 {
		t.Errorf("exit %d: %s", code, &p.log)
	}
	got := make(map[any]string)
	for range [4]int{} {
		s := receive(t, "reading", b.readings)
		got[s.ticket] = fmt.Sprint(s.code, " ", s.value)
	}
	if want := (map[any]string{1: "0 3", 2: "0 3", 3: "-15 nan", 4: "-15 nan"}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v; want %v", got, want)
	}
	await(t, "no process is left", func() bool { return len(marked(t, word)) == 0 })
}

// demoPackage is a package of a sensor that prints a number, and more.
func demoPackage(t testing.TB, n int, more ...packed) string {
	entries := append([]packed{entry("demo/", ""), entry("demo/check", printing(n))}, more...)
	return string(packageOf(t, entries...))
}

// TestStoryUpdate: readings go on while a package is fetched. An update with the
// ticket of one that is under way is that one; the others are made in one more at most.
func TestStoryUpdate(t *testing.T) {
	b := newBox(t, "", map[string]string{"packages/demo.tar.bz2": demoPackage(t, 2), "sensors/demo/check": printing(1)})
	b.packages = filepath.Join(b.dir, "packages")
	b.run(t)
	fetching, fetch := make(chan bool, 1), make(chan bool)
	b.set(func(_ http.ResponseWriter, try int) bool {
		if try == 1 {
			fetching <- true
			<-fetch
		}
		return false
	})
	mustCall(t, b.client, "cmd_update_sensor_code", "demo", 13)
	receive(t, "the fetch", fetching)
	for _, ticket := range []any{13, 14, 14, nil} {
		mustCall(t, b.client, "cmd_update_sensor_code", "demo", ticket)
	}
	wants(t, b.read(t, 15, "demo"), "ticket 15: exit 0, value 1")
	close(fetch)
	wants(t, receive(t, "the outcome", b.readings), "ticket 13: exit 0, value 1")
	wants(t, receive(t, "the outcome", b.readings), "ticket 14: exit 0, value 1")
	if n := b.tries.Load(); n > 5 {
		t.Errorf("the monitor was called %d times, to store 3 readings", n)
	}
}

// TestStoryMove: the agent moves when, and only when, all is well.
func TestStoryMove(t *testing.T) {
	healthy := newRecorder(t)
	ill := func(request, []any) (any, error) { return "ILL", nil }
	sick := serve(t, newHandler([]method{{"healthcheck", "string", "", ill}}))
	b := newBox(t, "", map[string]string{"sensors/s/check": printing(1)})
	old := b.url.String()
	b.config = "# top\r\n[monitor]\r\nurl : " + old + " ; the monitor\r\n[agent]\r\nlisten = 127.0.0.1:0 ; here"
	writeTree(t, b.dir, map[string]string{"client.cfg": b.config})
	b.run(t)
	written := func() string { return readTree(t, b.dir)["client.cfg"] }
	for i, test := range []struct{ next, want string }{
		{"", "fault -32602: there is no new monitor"},
		{"ftp://127.0.0.1/", "neither an http nor an https URL"},
		{"http://", "names no host"},
		{"http://b\u00fccher/", "a host is written in ASCII"},
		{"http://127.0.0.1:1/", "refused"},
		{sick.String(), `got "ILL"`},
	} {
		b.next = test.next
		lines := logged(t)
		wants(t, b.ask(t, "cmd_register_new_server", i), fmt.Sprintf("ticket %d: exit 1, value nan", i))
		wantLog(t, lines, "move: …"+test.want)
		if got := written(); got != b.config {
			t.Errorf("%s: got %q", test.next, got)
		}
	}
	// A file that cannot be written keeps it where it is.
	b.next = healthy.url.String()
	next := nextFile(filepath.Join(b.dir, "client.cfg"))
	writeTree(t, next, map[string]string{"x": ""})
	wants(t, b.ask(t, "cmd_register_new_server", 10), "ticket 10: exit 1, value nan")
	if err := os.RemoveAll(next); err != nil {
		t.Fatal(err)
	}
	// What is not delivered yet goes to the new monitor.
	trying, tried := make(chan bool), make(chan bool)
	b.stored = func(stored) error { trying <- true; <-tried; return faultf(1, "not now") }
	mustCall(t, b.client, "cmd_submit_reading", 11, "s")
	receive(t, "a try at the old one", trying)
	lines := logged(t)
	mustCall(t, b.client, "cmd_register_new_server", 12)
	wantLog(t, lines, "move: from now on the monitor is "+healthy.url.String())
	close(tried)
	wants(t, receive(t, "reading", healthy.readings), "ticket 11: exit 0, value 1")
	wants(t, receive(t, "reading", healthy.readings), "ticket 12: exit 0, value 1")
	if got, want := written(), strings.Replace(b.config, old, healthy.url.String(), 1); got != want {
		t.Errorf("got %q; want %q", got, want)
	}

	files := newCA(t, "ca").valid(t, "monitor")
	_, u := serveTLS(t, &monitor{next: "http://127.0.0.1:1/"}, files)
	c := newClient(u, patience, clientTLS(files))
	defer c.close()
	_, err := nextMonitor(context.Background(), c, httpURL)
	if want := "from https to http://127.0.0.1:1/"; !strings.Contains(fmt.Sprint(err), want) {
		t.Errorf("got %v; want %s", err, want)
	}
}

// TestStoryDisk: wherever the agent writes, a full disk costs nothing that was
// there. The agent goes on, says why, and does what is asked of it when there is
// room again.
func TestStoryDisk(t *testing.T) {
	t.Run("full disk", func(t *testing.T) {
		b := newBox(t, scarceConfig, nil)
		mount(t, "none", b.dir, "tmpfs", 0, "size=1m")
		filler := filepath.Join(b.dir, "filler")
		testScarce(t, b, "no space", func(_ int, bytes int64) error {
			if bytes < 0 {
				return os.Remove(filler)
			}
			f, err := os.OpenFile(filler, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
			if err != nil {
				return err
			}
			defer f.Close()
			for err == nil {
				_, err = f.Write(make([]byte, 4096))
			}
			if !errors.Is(err, syscall.ENOSPC) {
				return err
			}
			info, err := f.Stat()
			if err != nil {
				return err
			}
			return f.Truncate(info.Size() - bytes)
		})
	})
	t.Run("limited file size", func(t *testing.T) {
		testScarce(t, newBox(t, scarceConfig, nil), "file too large", func(pid int, bytes int64) error {
			limit := syscall.Rlimit{Cur: uint64(bytes), Max: math.MaxUint64}
			_, _, errno := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, uintptr(pid), syscall.RLIMIT_FSIZE,
				uintptr(unsafe.Pointer(&limit)), 0, 0, 0)
			if errno != 0 {
				return errno
			}
			return nil
		})
	})
}

const scarceConfig = "[sensor]\nbackup = backup\n[monitor]\nspool = spool\n"

// testScarce has an agent that may write only so many bytes update a sensor, fill
// its spool and move. A limit of -1 is none.
func testScarce(t *testing.T, b *box, reason string, limit func(pid int, bytes int64) error) {
	body := make([]byte, 20<<10)
	mathrand.New(mathrand.NewSource(3)).Read(body)
	archive := demoPackage(t, 2, entry("demo/data", string(body)), entry("demo/more", string(body[:9000])))
	next := newRecorder(t)
	b.packages, b.next = t.TempDir(), next.url.String()
	writeTree(t, b.packages, map[string]string{"demo.tar.bz2": archive})
	writeTree(t, b.dir, map[string]string{
		"sensors/demo/check": printing(1), "backup/": "", "spool/": "", "client.cfg": b.config,
	})
	p := b.start(t)
	set := func(bytes int64) {
		t.Helper()
		if err := limit(p.Process.Pid, bytes); err != nil {
			t.Fatal(err)
		}
	}
	tree := func() map[string]string { return readTree(t, filepath.Join(b.dir, "sensors")) }
	refused := 0
	for free := int64(0); ; free += 8192 {
		set(free)
		before := tree()
		if got := b.ask(t, "cmd_update_sensor_code", "demo", 1); got.code == 0 {
			break
		}
		refused++
		if after := tree(); !reflect.DeepEqual(after, before) {
			t.Fatalf("%d bytes free: got %q", free, after)
		}
		wants(t, b.read(t, 2, "demo"), "ticket 2: exit 0, value 1")
	}
	if refused < 3 {
		t.Errorf("%d refused", refused)
	}
	await(t, "a reason for each", func() bool { return strings.Count(p.log.String(), reason) == refused })
	wants(t, b.read(t, 2, "demo"), "ticket 2: exit 0, value 2")

	set(0)
	b.set(away)
	want := make(map[any]bool)
	for ticket := 100; ticket < 120; ticket++ {
		want[ticket] = true
		mustCall(t, b.client, "cmd_submit_reading", ticket, "demo")
	}
	wantLog(t, &p.log, "undelivered readings are in memory alone")
	b.set(nil)
	for len(want) > 0 {
		delete(want, receive(t, "reading", b.readings).ticket)
	}
	wants(t, b.ask(t, "cmd_register_new_server", 3), "ticket 3: exit 1, value nan")
	wantLog(t, &p.log, "move: …client.cfg…: "+reason)
	if got := readTree(t, b.dir)["client.cfg"]; got != b.config || len(leftovers(t, b.dir)) > 0 {
		t.Errorf("got %q, %q", got, leftovers(t, b.dir))
	}
	set(-1)
	mustCall(t, b.client, "cmd_register_new_server", 4)
	wants(t, receive(t, "outcome at the new monitor", next.readings), "ticket 4: exit 0, value 1")
	p.terminate(t)
	t.Logf("%s: %d updates refused", reason, refused)
}

// mount mounts something until the test ends, or skips the test.
func mount(t *testing.T, source, target, kind string, flags uintptr, data string) {
	t.Helper()
	if err := syscall.Mount(source, target, kind, flags, data); err != nil {
		t.Skipf("mount %s: %v", target, err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(target, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// TestStoryReadOnly: so with a directory that is read-only.
func TestStoryReadOnly(t *testing.T) {
	for _, test := range []struct {
		where, method string
		params        []any
		code          int
		want          string // in the log, before the reason
	}{
		{"sensors", "cmd_update_sensor_code", []any{"demo", 1}, 1, "update demo: …/sensors/…"},
		{"backup", "cmd_update_sensor_code", []any{"demo", 1}, 1, "update demo: …backup…"},
		{"etc", "cmd_register_new_server", []any{1}, 1, "move: …client.cfg…"},
		{"spool", "cmd_submit_reading", []any{1, "demo"}, 0, "spool …"},
	} {
		t.Run(test.where, func(t *testing.T) {
			b := newBox(t, "[sensor]\npath = ../sensors\nbackup = ../backup\n[monitor]\nspool = ../spool\n", map[string]string{
				"sensors/demo/check": printing(1), "backup/": "", "spool/": "", "packages/demo.tar.bz2": demoPackage(t, 2),
			})
			writeTree(t, b.dir, map[string]string{"etc/client.cfg": b.config})
			b.packages, b.next = filepath.Join(b.dir, "packages"), newRecorder(t).url.String()
			before := readTree(t, b.dir)
			readOnly(t, filepath.Join(b.dir, test.where))
			if test.where == "spool" {
				b.set(away)
			}
			p := b.start(t, "-c", "etc/client.cfg")
			mustCall(t, b.client, test.method, test.params...)
			if test.where == "spool" {
				wantLog(t, &p.log, "in memory alone")
				b.set(nil)
			}
			if got := receive(t, "outcome", b.readings); got.code != test.code {
				t.Errorf("got %+v", got)
			}
			wants(t, b.read(t, 2, "demo"), "ticket 2: exit 0, value 1")
			reason := "read-only"
			if os.Geteuid() != 0 {
				reason = "permission denied"
			}
			wantLog(t, &p.log, test.want+reason)
			p.terminate(t)
			after := readTree(t, b.dir)
			delete(after, "spool/readings") // which is empty
			if !reflect.DeepEqual(after, before) {
				t.Errorf("got %q", after)
			}
		})
	}
}

// readOnly makes a directory read-only to the end of the test, for root, too.
func readOnly(t *testing.T, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		if err := os.Chmod(dir, 0o555); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Chmod(dir, 0o755) })
		return
	}
	mount(t, dir, dir, "", syscall.MS_BIND, "")
	if err := syscall.Mount("", dir, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
}

// TestKill kills the agent at random moments under load. No reading that was
// in the spool is lost, and none is made up; what is damaged in the file costs
// one reading.
func TestKill(t *testing.T) {
	random := mathrand.New(mathrand.NewSource(1))
	b := newBox(t, "[sensor]\nconcurrency = 4\n[monitor]\nspool = spool\n", map[string]string{
		"sensors/s/check": "#!/bin/sh\necho $1\n",
	})
	b.readings = make(chan stored, 1<<20)
	spool := filepath.Join(b.dir, "spool")
	sent, owed, damaged := 0, make(map[string]bool), 0
	for n := 0; n < *kills; n++ {
		b.set(away)
		if random.Intn(3) == 0 {
			b.set(nil)
		}
		p := b.start(t)
		for i := random.Intn(30); i > 0; i-- {
			sent++
			// Acknowledged or not: the agent is to be killed.
			b.client.call(context.Background(), "cmd_submit_reading", sent, "s", []any{sent})
		}
		time.Sleep(time.Duration(random.Intn(20)) * time.Millisecond) // any moment will do
		p.signal(t, syscall.SIGKILL)
		p.wait(t)
		b.client.close()
		left := spooled(t, spool)
		for _, reading := range left {
			owed[reading] = true
		}
		if n%3 == 0 {
			most := damage(t, random, filepath.Join(spool, "readings"))
			lost := slices.DeleteFunc(left, func(r string) bool { return slices.Contains(spooled(t, spool), r) })
			if len(lost) > most {
				t.Errorf("a damage cost %q", lost)
			}
			for _, reading := range lost {
				delete(owed, reading)
				damaged++
			}
		}
	}
	b.set(nil)
	p := b.start(t)
	delivered := make(map[string]int)
	for len(owed) > 0 {
		got := receive(t, "a reading that was in the spool", b.readings)
		text := fmt.Sprintf("%v=%s", got.ticket, got.value)
		ticket, ok := got.ticket.(int)
		if !ok || ticket < 1 || ticket > sent || got.code == 0 && got.value != fmt.Sprint(ticket) {
			t.Errorf("made up: %+v", got)
		}
		delivered[text]++
		delete(owed, text)
	}
	await(t, "the spool is empty", func() bool { return len(spooled(t, spool)) == 0 })
	p.terminate(t)
	total("kills survived", *kills)
	t.Logf("%d kills, %d commands, %d readings delivered, %d damaged on purpose", *kills, sent, len(delivered), damaged)
}

// damage spoils a spool as a power cut or bad flash may, and returns how many
// readings that may cost.
func damage(t *testing.T, random *mathrand.Rand, file string) (most int) {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	most = 1
	switch kind := random.Intn(3); {
	case kind == 0 || len(text) == 0:
		text, most = append(text, "garbage with no end"...), 0
	case kind == 1:
		text = text[:len(text)-1-random.Intn(min(20, len(text)))]
	default:
		i := random.Intn(len(text))
		if text[i] == '\n' {
			most = 2 // lines become one
		}
		text[i] ^= 0x40
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return most
}

// A soakMonitor stores readings, and misbehaves at random.
type soakMonitor struct {
	mu     sync.Mutex // guards what is below
	random *mathrand.Rand
	stored map[any][]stored
	lossy  map[any]bool // what was stored, but not confirmed
	faults map[any]int
	down   int  // attempts that it is away for
	good   bool // it misbehaves no more
}

// serve serves the monitor at two addresses, each of which sends agents to the
// other, and returns the first.
func (m *soakMonitor) serve(t *testing.T, packages string) string {
	monitors := [2]*monitor{{packages: packages}, {packages: packages}}
	for i, inner := range monitors {
		inner.stored = func(s stored) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.stored[s.ticket] = append(m.stored[s.ticket], s)
			return nil
		}
		h := newHandler(inner.methods())
		u := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return
			}
			method, params, err := decodeCall(body)
			if err != nil {
				t.Errorf("the agent sent %q: %v", body, err)
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
			before, after := m.mood(method, params)
			switch {
			case before != nil:
				before(w)
			case after != nil:
				h.ServeHTTP(httptest.NewRecorder(), r)
				after(w)
			default:
				h.ServeHTTP(w, r)
			}
		}))
		monitors[1-i].next = u.String()
	}
	return monitors[1].next
}

// mood is what is done instead of storing a reading, or instead of confirming it.
func (m *soakMonitor) mood(method string, params []any) (before, after func(http.ResponseWriter)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fail := func(w http.ResponseWriter) { w.WriteHeader(503) }
	reset := func(http.ResponseWriter) { panic(http.ErrAbortHandler) }
	dice := m.random.Intn(100)
	switch {
	case m.good || method != "cmd_store_probe_data":
	case m.down > 0:
		m.down--
		return fail, nil
	case dice < 3:
		return fail, nil
	case dice < 5:
		return reset, nil
	case dice < 7:
		return func(w http.ResponseWriter) { io.WriteString(w, "<html>busy</html>") }, nil
	case dice < 9 && m.faults[params[0]] < maxTries-1:
		m.faults[params[0]]++
		return func(w http.ResponseWriter) { w.Write(encodeResponse(nil, faultf(1, "locked"))) }, nil
	case dice < 11:
		m.lossy[params[0]] = true
		return nil, reset
	case dice < 13:
		m.lossy[params[0]] = true
		return nil, fail
	case dice < 15:
		time.Sleep(20 * time.Millisecond) // a slow one
	}
	return nil, nil
}

// TestSoak is what years bring, in a minute: readings of all kinds, updates,
// reloads, moves and a monitor that fails in every way. In the end each
// acknowledged ticket is stored, once or where its answer was lost at least
// once, and everything the agent used is given back.
func TestSoak(t *testing.T) {
	word := mark(t)
	dir := t.TempDir()
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	debug.FreeOSMemory()
	before := residentMemory(t, "self", "VmRSS")
	t.Run("load", func(t *testing.T) { (&soak{dir: dir, acked: make(map[any]string)}).run(t) })
	await(t, "no process is left", func() bool { return len(marked(t, word)) == 0 })
	await(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= goroutines })
	await(t, "no file is open", func() bool { return openFiles(t) <= files })
	if left := leftovers(t, filepath.Join(dir, "sensors"), filepath.Join(dir, "backup"), dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	debug.FreeOSMemory()
	after := residentMemory(t, "self", "VmRSS")
	t.Logf("resident memory %d KiB before, %d KiB after", before, after)
	if after > before+32<<10 && !raceDetector() {
		t.Errorf("resident memory grew from %d to %d KiB", before, after)
	}
}

// residentMemory is a figure of /proc/PID/status, in KiB.
func residentMemory(t testing.TB, pid any, name string) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%v/status", pid))
	match := regexp.MustCompile(name + `:\s+(\d+) kB`).FindSubmatch(text)
	if err != nil || match == nil {
		t.Fatal(err, string(text))
	}
	n, _ := strconv.Atoi(string(match[1]))
	return n
}

// openFiles counts the open files of this process.
func openFiles(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return len(entries)
}

// A soak is four callers that ask one agent for everything.
type soak struct {
	dir              string
	agent            *agent
	client           *client
	monitor          *soakMonitor
	tickets, outages atomic.Int64

	mu    sync.Mutex
	acked map[any]string // what must be stored; "" is anything
}

func (s *soak) run(t *testing.T) {
	m := &soakMonitor{
		random: mathrand.New(mathrand.NewSource(2)), stored: make(map[any][]stored),
		lossy: make(map[any]bool), faults: make(map[any]int),
	}
	url := m.serve(t, filepath.Join(s.dir, "packages"))
	writeTree(t, s.dir, map[string]string{
		"sensors/good/check": "#!/bin/sh\necho $1\n", "sensors/fail/check": "#!/bin/sh\necho no >&2; exit 3\n",
		"sensors/text/check": "#!/bin/sh\necho hello\n", "sensors/hang/check": "#!/bin/sh\nsleep 60\n",
		"sensors/demo/check": printing(1), "packages/demo.tar.bz2": demoPackage(t, 1),
		"client.cfg": "[sensor]\nbackup = backup\nconcurrency = 4\ntimeout = 2s\n" +
			"[monitor]\nspool = spool\nurl = " + url + "\n[agent]\nlisten = 127.0.0.1:0\n",
	})
	settings, err := loadSettings(filepath.Join(s.dir, "client.cfg"))
	if err != nil {
		t.Fatal(err)
	}
	s.monitor = m
	s.agent, s.client = startAgent(t, settings)
	s.agent.delivery.mu.Lock()
	s.agent.delivery.retry = time.Millisecond
	s.agent.delivery.mu.Unlock()

	ctx, cancel := context.WithTimeout(context.Background(), *soakTime)
	defer cancel()
	var callers sync.WaitGroup
	for i := 0; i < 4; i++ {
		callers.Add(1)
		go func(random *mathrand.Rand) {
			defer callers.Done()
			for n := 0; ctx.Err() == nil; n++ {
				if s.behind() > 2000 { // the spool holds some 7,000
					time.Sleep(time.Millisecond)
					continue
				}
				s.ask(t, random, n)
			}
		}(mathrand.New(mathrand.NewSource(int64(i))))
	}
	callers.Wait()
	m.mu.Lock()
	m.good = true
	m.mu.Unlock()
	await(t, "every acknowledged ticket is stored", s.done)
	s.check(t)
}

// behind returns about how many tickets the monitor does not have yet.
func (s *soak) behind() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.monitor.mu.Lock()
	defer s.monitor.mu.Unlock()
	return len(s.acked) - len(s.monitor.stored)
}

// done reports whether every acknowledged ticket is stored.
func (s *soak) done() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.monitor.mu.Lock()
	defer s.monitor.mu.Unlock()
	for ticket := range s.acked {
		if len(s.monitor.stored[ticket]) == 0 {
			return false
		}
	}
	return true
}

// ask asks for one thing at random.
func (s *soak) ask(t *testing.T, random *mathrand.Rand, n int) {
	switch dice := random.Intn(1000); {
	case dice < 5:
		s.call(t, "-15 nan", "cmd_submit_reading", "TICKET", "hang")
	case dice < 50:
		s.call(t, "3 nan", "cmd_submit_reading", "TICKET", "fail")
	case dice < 100:
		s.call(t, "65 nan", "cmd_submit_reading", "TICKET", "text", nil)
	case dice < 150:
		s.call(t, "127 nan", "cmd_submit_reading", "TICKET", "none", "a b")
	case dice < 160:
		s.call(t, "", "cmd_update_sensor_code", "demo", "TICKET")
	case dice < 165:
		s.call(t, "", "cmd_rollback_sensor_code", "demo", "TICKET")
	case dice < 170:
		s.call(t, "", "cmd_register_new_server", "TICKET")
	case dice < 180:
		s.call(t, "0 1", "cmd_submit_reading", "TICKET", "demo")
	case dice < 190:
		s.call(t, "", "cmd_submit_reading", "TICKET", "picket", "uptime")
	case dice < 195:
		mustCall(t, s.client, "cmd_list_sensors")
	case dice < 200:
		if answer := s.peer(t, func(conn *net.TCPConn) { conn.CloseWrite() }); !strings.HasPrefix(answer, "HTTP/1.0 200 ") {
			t.Errorf("half-closed: got %q", answer)
		}
	case dice < 205:
		s.peer(t, func(conn *net.TCPConn) { conn.SetLinger(0); conn.Close() })
	case dice < 208:
		file, concurrency := filepath.Join(s.dir, "client.cfg"), fmt.Sprint(2+random.Intn(4))
		if got := picket("-c", file, "config", "set", "sensor", "concurrency", concurrency); got != "exit 0\n" {
			t.Error(got)
		}
		s.agent.reload()
	case dice < 212:
		s.monitor.mu.Lock()
		s.monitor.down = s.monitor.random.Intn(12) // the last after two seconds
		s.monitor.mu.Unlock()
		s.outages.Add(1)
	default:
		v := fmt.Sprintf("%d.%d", n, random.Intn(100))
		s.call(t, "0 "+v, "cmd_submit_reading", "TICKET", "good", []any{v})
	}
}

// call gives a command with a ticket of its own, of which want must come.
func (s *soak) call(t *testing.T, want, method string, params ...any) {
	ticket := int(s.tickets.Add(1))
	params[slices.Index(params, any("TICKET"))] = ticket
	if _, err := s.client.call(context.Background(), method, params...); err != nil {
		t.Errorf("%s: %v", method, err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.acked[ticket] = want
}

// peer gives a command, as a peer that ends its connection so, and returns the
// answer.
func (s *soak) peer(t *testing.T, end func(*net.TCPConn)) string {
	ticket := int(s.tickets.Add(1))
	body := encodeCall("cmd_submit_reading", ticket, "good", []any{ticket})
	conn, err := net.Dial("tcp", s.client.url.Host)
	if err != nil {
		t.Error(err)
		return ""
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	end(conn.(*net.TCPConn))
	answer, _ := io.ReadAll(conn)
	if strings.Contains(string(answer), "<string>OK</string>") {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.acked[ticket] = fmt.Sprint("0 ", ticket)
	}
	return string(answer)
}

// check compares what the monitor has with what was acknowledged.
func (s *soak) check(t *testing.T) {
	m := s.monitor
	m.mu.Lock()
	defer m.mu.Unlock()
	readings, faults := 0, 0
	for ticket, want := range s.acked {
		got := m.stored[ticket]
		readings += len(got)
		if len(got) > 1 && !m.lossy[ticket] {
			t.Errorf("ticket %v: stored %d times", ticket, len(got))
		}
		if text := fmt.Sprint(got[0].code, " ", got[0].value); want != "" && text != want {
			t.Errorf("ticket %v: got %s; want %s", ticket, text, want)
		}
	}
	for _, n := range m.faults {
		faults += n
	}
	total("commands acknowledged", len(s.acked))
	total("readings stored", readings)
	total("answers lost on purpose", len(m.lossy))
	total("faults answered", faults)
	total("outages of the monitor", int(s.outages.Load()))
}

// TestInit: the agent under busybox's init as process 1 of namespaces of its
// own, with nothing but busybox beside it: no /tmp, no /dev/log, all read-only
// but for one directory, and the zone as in /etc/TZ.
func TestInit(t *testing.T) {
	busybox, unshare := program(t, "busybox"), program(t, "unshare")
	if os.Geteuid() != 0 {
		t.Skip("not root")
	}
	tool, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	b := newBox(t, "[monitor]\nspool = spool\n", nil)
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b.dir = filepath.Join(root, "var/picket")
	spool := filepath.Join(b.dir, "spool")
	writeTree(t, root, map[string]string{
		"proc/": "", "dev/null": "", "etc/TZ": "XYZ-5:30\n", "bin/busybox": string(tool),
		"etc/inittab": "::respawn:/var/picket/picket\n::respawn:/bin/sleep 1000\n",
	})
	writeTree(t, b.dir, shipped(t, "sensors/"))
	writeTree(t, b.dir, map[string]string{
		"client.cfg": b.config, "sensors/slow/check": "#!/bin/sh\nexec tail -f /dev/null\n",
		"sensors/daemon/check": "#!/bin/sh\nsetsid sh -c ': >started; exec sleep 1000' >/dev/null 2>&1 &\n" +
			"until [ -e started ]; do :; done; echo 5\n",
	})
	build(t, b.dir)
	script := `set -e; cd "$1"
		mount --bind . .
		cd "$1"
		chroot . /bin/busybox --install -s /bin
		mount --bind var var
		mount -o remount,bind,ro .
		mount --bind /dev/null dev/null
		mount -t proc none proc
		exec chroot . /bin/busybox env -i /bin/init`
	boot := start(t, exec.Command(unshare, "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh", root))
	kill := func(name string, signal syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(named(t, root, name)[0], signal); err != nil {
			t.Fatalf("kill %s: %v", name, err)
		}
	}
	b.client = boot.client(t)
	now := time.Now().UTC().Add(5*time.Hour + 30*time.Minute).Format("20060102T15")
	for i, ask := range [][]any{{"uptime", "seconds"}, {"memory", "free_pct"}, {"daemon"}, {"picket", "uptime"}} {
		got := b.ask(t, "cmd_submit_reading", append([]any{i}, ask...)...)
		if got.code != 0 || !strings.HasPrefix(string(got.time), now) && i == 0 {
			t.Errorf("%v: got %+v at %s; want %s", ask, got, got.time, now)
		}
	}
	var sleeps []int
	await(t, "init's sleep and that which the sensor left", func() bool {
		sleeps = named(t, root, "sleep")
		return len(sleeps) == 2
	})

	// Killed, it is started again, and what it had not delivered is.
	b.set(away)
	mustCall(t, b.client, "cmd_submit_reading", 10, "daemon")
	await(t, "it is in the spool", func() bool { return len(spooled(t, spool)) == 1 })
	kill("picket", syscall.SIGKILL)
	b.set(nil)
	b.client = boot.client(t)
	wants(t, receive(t, "reading", b.readings), "ticket 10: exit 0, value 5")
	await(t, "the spool is empty", func() bool { return len(spooled(t, spool)) == 0 })
	mustCall(t, b.client, "healthcheck")

	// With a wrong configuration it does not spin, and a signal has it look again.
	writeTree(t, b.dir, map[string]string{"client.cfg": strings.Replace(b.config, "http:", "ftp:", 1)})
	kill("picket", syscall.SIGKILL)
	waits := func(times int) {
		t.Helper()
		await(t, "it waits", func() bool {
			return strings.Count(boot.log.String(), "; ends in 30s, or at a signal\n") == times
		})
	}
	waits(1)
	kill("picket", syscall.SIGHUP)
	waits(2)
	wantLog(t, &boot.log, `picket: /var/picket/client.cfg:2: [monitor] url: "ftp://`)
	writeTree(t, b.dir, map[string]string{"client.cfg": b.config})
	kill("picket", syscall.SIGHUP)
	b.client = boot.client(t)

	// Init's shutdown ends it in time.
	for _, pid := range sleeps {
		if syscall.Kill(pid, 0) != nil {
			t.Errorf("process %d is gone", pid)
		}
	}
	mustCall(t, b.client, "cmd_submit_reading", 11, "slow")
	await(t, "it runs", func() bool { return len(named(t, root, "tail")) == 1 })
	kill("init", syscall.SIGUSR2)
	wants(t, receive(t, "its reading", b.readings), "ticket 11: exit -15, value nan")
	boot.wait(t) // the end of a namespace has no exit code that means anything
	if left := append(named(t, root, "picket"), named(t, root, "tail")...); len(left) > 0 || len(spooled(t, spool)) > 0 {
		t.Errorf("left: processes %v, readings %q", left, spooled(t, spool))
	}
	wantLog(t, &boot.log, "picket: ending\n")
}

// named lists the processes of that name in a root directory.
func named(t *testing.T, root, name string) (pids []int) {
	t.Helper()
	entries, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		dir, _ := os.Readlink(entry + "/root") // it may have ended
		comm, _ := os.ReadFile(entry + "/comm")
		if dir == root && strings.TrimSpace(string(comm)) == name {
			pid, _ := strconv.Atoi(filepath.Base(entry))
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestQuickStart runs what the README says under "See it work", as printed, in a
// copy of the source and a network of its own.
func TestQuickStart(t *testing.T) {
	busybox, unshare := program(t, "busybox"), program(t, "unshare")
	program(t, "make")
	if os.Geteuid() != 0 {
		t.Skip("not root")
	}
	blocks := readmeBlocks(t, "See it work")
	if len(blocks) != 3 {
		t.Fatalf("got %d blocks", len(blocks))
	}
	typed := func(block string) (commands []string, printed string) {
		for _, line := range strings.SplitAfter(strings.TrimSpace(block)+"\n", "\n") {
			if command, ok := strings.CutPrefix(line, "$ "); ok {
				commands = append(commands, strings.TrimSpace(command))
			} else {
				printed += line
			}
		}
		return commands, printed
	}
	first, firstPrints := typed(blocks[0])
	second, secondPrints := typed(blocks[1])
	if len(first) != 2 || len(second) < 3 {
		t.Fatalf("got %q, %q", first, second)
	}
	dir := t.TempDir()
	writeTree(t, dir, shipped(t, ""))
	source, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(source, "go.mod", "Makefile") {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		writeTree(t, dir, map[string]string{name: string(text)})
	}
	script := strings.Join([]string{
		"set -e", busybox + " ip link set lo up",
		first[0] + " >build.log 2>&1", first[1] + " >first 2>&1 &", "until grep -q ' on ' first; do sleep 0.02; done",
		second[0], "until grep -q ' on ' agent.log; do sleep 0.02; done",
		"{ " + strings.Join(second[1:], "\n") + "\n} >second",
		"until [ $(grep -c ' ticket ' first) = 2 ]; do sleep 0.02; done",
	}, "\n")
	cmd := exec.Command(unshare, "--net", "--pid", "--fork", "--kill-child", "sh", "-c", script)
	cmd.Dir = dir
	p := start(t, cmd)
	code := p.wait(t)
	tree := readTree(t, dir)
	if code != 0 {
		t.Fatalf("exit %d: %s\n%s%s", code, &p.log, tree["build.log"], tree["agent.log"])
	}
	if tree["second"] != secondPrints {
		t.Errorf("got %q; want %q", tree["second"], secondPrints)
	}
	times := regexp.MustCompile(`\d{8}T[\d:]{8}|value [\d.]+`) // and values
	want := times.ReplaceAllString(firstPrints+strings.TrimSpace(blocks[2])+"\n", "…")
	if !like(tree["first"], want) {
		t.Errorf("got %s; want %s", tree["first"], want)
	}
}

// startTiny starts the agent in a memory cgroup of 16 MiB, and reports whether
// this machine has such groups.
func (b *box) startTiny(t *testing.T) (p *child, limited bool) {
	t.Helper()
	build(t, b.dir)
	group, limited := memoryGroup(t, 16<<20)
	cmd := exec.Command("sh", "-c", `[ -z "$1" ] || echo $$ >"$1/cgroup.procs"; exec ./picket`, "sh", group)
	cmd.Dir = b.dir
	p = start(t, cmd)
	b.client = p.client(t)
	return p, limited
}

// TestTinyBox: 16 MiB are enough for the agent and its sensors, with a spool,
// an outage, more commands than it takes at once, and an update of 4 MiB.
func TestTinyBox(t *testing.T) {
	b := newBox(t, "[monitor]\nspool = spool\n", map[string]string{"sensors/s/check": printing(1)})
	b.packages = filepath.Join(b.dir, "packages")
	largePackage(t, b.packages)
	p, limited := b.startTiny(t)
	ask := func(from, n int) {
		t.Helper()
		var all sync.WaitGroup
		for i := 0; i < 8; i++ {
			all.Add(1)
			go func(i int) {
				defer all.Done()
				c := newClient(b.client.url, patience, nil)
				defer c.close()
				for k := i; k < n; k += 8 {
					if _, err := c.call(context.Background(), "cmd_submit_reading", from+k, "s"); err != nil {
						t.Error(err)
						return
					}
				}
			}(i)
		}
		all.Wait()
	}
	const n = 1500
	b.set(away)
	ask(0, n)
	b.set(nil)
	ask(n, n)
	mustCall(t, b.client, "cmd_update_sensor_code", "demo", "update")
	seen := make(map[any]bool)
	for len(seen) < 2*n+1 {
		got := receive(t, "reading", b.readings)
		if got.code != 0 || got.value != "1" {
			t.Fatalf("got %+v", got)
		}
		seen[got.ticket] = true
	}
	peak := residentMemory(t, p.Process.Pid, "VmHWM")
	t.Logf("peak of resident memory %d KiB, limited: %v", peak, limited)
	if !limited && peak > 20<<10 {
		t.Errorf("peak of resident memory %d KiB", peak)
	}
	p.terminate(t)
}

// memoryGroup makes a memory cgroup that ends with the test, where it can.
func memoryGroup(t *testing.T, limit int64) (dir string, ok bool) {
	for root, file := range map[string]string{
		"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max",
	} {
		dir, err := os.MkdirTemp(root, "picket-test-")
		if err != nil {
			continue
		}
		t.Cleanup(func() {
			await(t, "the cgroup is empty", func() bool {
				err := os.Remove(dir)
				return err == nil || errors.Is(err, fs.ErrNotExist)
			})
		})
		if f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0); err == nil {
			_, err = fmt.Fprint(f, limit)
			f.Close()
			if err == nil {
				return dir, true
			}
		}
	}
	return "", false
}

// TestPeers: XML-RPC libraries that nobody here wrote command the agent, and
// take its readings.
func TestPeers(t *testing.T) {
	t.Run("python3", func(t *testing.T) { testPeer(t, program(t, "python3"), "testdata/peers/peer.py") })
	if path := findPython2(); path != "" {
		t.Run("python2.7", func(t *testing.T) { testPeer(t, path, "testdata/peers/peer.py") })
	}
	t.Run("RPC::XML", func(t *testing.T) {
		perl := program(t, "perl")
		if err := exec.Command(perl, "-MRPC::XML", "-e", "1").Run(); err != nil {
			t.Skip("no RPC::XML on this machine")
		}
		testPeer(t, perl, "testdata/peers/peer.pl")
	})
	t.Run("xmlrpc-c", func(t *testing.T) {
		peer := filepath.Join(t.TempDir(), "peer")
		libraries := "-lxmlrpc_server_abyss -lxmlrpc_server -lxmlrpc_abyss -lxmlrpc_client -lxmlrpc -lxmlrpc_util -lpthread"
		args := append([]string{"-o", peer, "testdata/peers/peer.c"}, strings.Fields(libraries)...)
		if out, err := exec.Command(program(t, "cc"), args...).CombinedOutput(); err != nil {
			t.Skipf("no xmlrpc-c on this machine: %.200s", out)
		}
		testPeer(t, peer)
	})
}

func testPeer(t *testing.T, command ...string) {
	peer := func(args ...string) *exec.Cmd {
		return exec.Command(command[0], append(command[1:len(command):len(command)], args...)...)
	}
	monitor := wrapped(peer("monitor"), "sh", "-c", `exec "$@" >&2`, "sh") // what it prints is its log
	input, err := monitor.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, monitor)
	b := newBox(t, "", map[string]string{"sensors/words/check": "#!/bin/sh\necho $#"})
	b.config += "[monitor]\ntime = utc\nurl = http://" + p.address(t) + "/xmlrpc/\n"
	writeTree(t, b.dir, map[string]string{"client.cfg": b.config})
	b.run(t)
	out, err := peer("caller", b.client.url.String()).CombinedOutput()
	if err != nil {
		t.Errorf("caller: %v", err)
	}
	want := map[string]string{}
	for _, c := range cases(t, "testdata/peers/expected.txt") {
		want[c.name] = c.text
		if strings.Contains(command[0], "python") { // whose library cannot send an i8
			want[c.name] = regexp.MustCompile(`(?m)^(i8|stored i8) .*\n`).ReplaceAllString(c.text, "")
		}
	}
	if string(out) != want["caller"] {
		t.Errorf("caller: got\n%s\nwant\n%s", out, want["caller"])
	}
	await(t, "all readings", func() bool {
		return strings.Count(p.log.String(), "\n") > strings.Count(want["monitor"], "\n")
	})
	_, got, _ := strings.Cut(p.log.String(), "\n") // behind its address
	got = regexp.MustCompile(`\d{8}T\d\d:\d\d:\d\d`).ReplaceAllString(sortedLines(got), "TIME")
	if got != want["monitor"] {
		t.Errorf("monitor: got\n%s\nwant\n%s", got, want["monitor"])
	}
	input.Close()
	if code := p.wait(t); code != 0 {
		t.Errorf("monitor: exit %d", code)
	}
}

func sortedLines(text string) string {
	lines := strings.SplitAfter(text, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// TestFaultSurroundings: a sensor that runs as another user has no terminal, none
// of the files that whoever started picket had open, and a home of its own,
// whichever command runs it. ^C ends that command all the same.
func TestFaultSurroundings(t *testing.T) {
	nobody, err := user.Lookup("nobody")
	if err != nil || os.Geteuid() != 0 {
		t.Skip("not root, or no user nobody")
	}
	const sensor = `#!/bin/sh
has=; (: <>/dev/tty) 2>/dev/null && has=/dev/tty
for f in 0 1 2; do [ -t $f ] && has="$has $f"; done
for f in /proc/$$/fd/*; do case $(readlink $f) in */secret) has="$has $f";; esac; done
echo "has [$has] $HOME $USER $LOGNAME" >>$SEEN
[ "$1" = hang ] && sleep 60
echo 1
`
	want := fmt.Sprintf("has [] %s nobody nobody\n", nobody.HomeDir)
	for _, test := range []struct{ command, shell string }{ // picket leads the session, or a shell does
		{"", ""}, {"check s", ""}, {"check s", "sh"}, {"check s hang", "sh"}, {"list", ""},
		{"install demo.tar", ""}, {"update demo", ""}, {"selftest", ""},
	} {
		t.Run(test.shell+" picket "+test.command, func(t *testing.T) {
			archive := string(packageOf(t, entry("demo/", ""), entry("demo/check", sensor)))
			b := newBox(t, "[sensor]\nuser = nobody\n", map[string]string{
				"sensors/s/check": sensor, "seen": "", "secret": "", "demo.tar": archive, "demo.tar.bz2": archive,
			})
			b.packages = b.dir
			seen := filepath.Join(b.dir, "seen")
			t.Setenv("SEEN", seen)
			for file, mode := range map[string]fs.FileMode{filepath.Dir(b.dir): 0o755, seen: 0o666} {
				if err := os.Chmod(file, mode); err != nil {
					t.Fatal(err)
				}
			}
			secret, err := os.Open(filepath.Join(b.dir, "secret"))
			if err != nil {
				t.Fatal(err)
			}
			defer secret.Close()
			cmd := self(t, b.dir, strings.Fields(test.command)...)
			if test.shell != "" {
				cmd = wrapped(cmd, test.shell, "-c", `"$@"; exit $?`, test.shell)
			}
			cmd.ExtraFiles = []*os.File{secret, secret}
			keyboard := startOnTerminal(t, cmd)
			says := bufio.NewReader(keyboard)
			switch test.command {
			case "":
				line, _ := says.ReadString('\n')
				match := servesAt.FindStringSubmatch(line)
				if match == nil {
					t.Fatalf("got %q", line)
				}
				b.client = clientOf(t, match[1])
				b.read(t, 1, "s")
				cmd.Process.Signal(syscall.SIGTERM)
			case "check s hang":
				await(t, "it runs", func() bool { return readTree(t, b.dir)["seen"] != "" })
				io.WriteString(keyboard, "\x03")
			}
			said := make(chan string, 1)
			go func() {
				text, _ := io.ReadAll(says) // which fails at the end, as the terminal is hung up
				said <- string(text)
			}()
			text := receive(t, "the end of picket", said)
			if got := readTree(t, b.dir)["seen"]; got == "" || strings.ReplaceAll(got, want, "") != "" {
				t.Errorf("got %q; want %q; picket says %s", got, want, text)
			}
		})
	}
}

// startOnTerminal starts a program as the leader of a session on a pseudo terminal,
// kills it when the test ends, and returns the other end of the terminal.
func startOnTerminal(t *testing.T, cmd *exec.Cmd) *os.File {
	t.Helper()
	here, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { here.Close() })
	var unlock, n int32
	for request, value := range map[uintptr]*int32{syscall.TIOCSPTLCK: &unlock, syscall.TIOCGPTN: &n} {
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, here.Fd(), request, uintptr(unsafe.Pointer(value))); errno != 0 {
			t.Skip(errno)
		}
	}
	there, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer there.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = there, there, there
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return here
}

// TestFaultReload: no reload takes away a protection that is in force, as one does
// that meets a client.cfg which is empty or half written. SIGTERM does not wait for
// a reload.
func TestFaultReload(t *testing.T) {
	files := newCA(t, "ca").valid(t, "monitor")
	public, _ := signify(t, "keynum_1")
	protections := "[agent]\ncertificate = " + files.certificate + "\nkey = " + files.key +
		"\nallow = 127.0.0.1\nclient_ca = " + files.ca + "\nclient_name = monitor\n" +
		"[monitor]\nca = " + files.ca + "\n[sensor]\nupdate = no\npublic_key = key.pub\n"
	names := []string{"allow", "certificate", "client_ca", "client_name", "ca", "update", "public_key"}
	if os.Geteuid() == 0 {
		protections, names = protections+"user = nobody\n", append(names, "user")
	}
	b := newBox(t, protections, map[string]string{"key.pub": public})
	p := b.start(t)
	b.client.url.Scheme = "https"
	c := newClient(b.client.url, patience, clientTLS(files))
	defer c.close()
	mustCall(t, c, "healthcheck")
	reload := func(text string) string {
		t.Helper()
		before := len(p.log.String())
		writeTree(t, b.dir, map[string]string{"client.cfg": text})
		p.signal(t, syscall.SIGHUP)
		const refused, taken = "the settings before stay in force\n", "is in force; on"
		await(t, "the reload", func() bool {
			log := p.log.String()[before:]
			return strings.Contains(log, refused) || strings.Contains(log, taken)
		})
		return p.log.String()[before:]
	}
	texts := map[string]string{"": "", b.config[:strings.Index(b.config, "allow")]: "allow"} // with what is missed
	for _, name := range names {
		line := regexp.MustCompile(`(?m)^` + name + ` = .*\n`)
		if name == "certificate" {
			line = regexp.MustCompile(`(?m)^(certificate|key) = .*\n`)
		}
		texts[line.ReplaceAllString(b.config, "")] = name
	}
	for text, name := range texts {
		if got := reload(text); strings.Contains(got, "is in force; on") || !strings.Contains(got, name) {
			t.Errorf("without %q: got %s", name, got)
		}
	}
	mustCall(t, c, "healthcheck")
	if got := reload(b.config + "[agent]\nqueue = 100\n"); strings.Contains(got, "stay in force") {
		t.Errorf("got %s", got)
	}
	before := strings.Count(p.log.String(), "in force")
	p.signal(t, syscall.SIGHUP, syscall.SIGTERM)
	if code := p.wait(t); code != 0 || strings.Count(p.log.String(), "in force") > before {
		t.Errorf("SIGTERM after a SIGHUP: exit %d: %s", code, &p.log)
	}
}

// TestFaultFIFO: a file that is none is refused where picket reads one. It waits
// for nobody to write.
func TestFaultFIFO(t *testing.T) {
	files := newCA(t, "ca").valid(t, "box")
	pair := "certificate = " + files.certificate + "\nkey = " + files.key + "\n"
	fifo := func(t *testing.T, dir string) {
		if err := syscall.Mkfifo(filepath.Join(dir, "fifo.tar"), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct{ config, command string }{
		{"", "-c fifo.tar"}, {"", "-c fifo.tar check s"}, {"", "install fifo.tar"},
		{"certificate = fifo.tar\nkey = " + files.key, ""}, {"key = fifo.tar\ncertificate = " + files.certificate, ""},
		{pair + "client_ca = fifo.tar", ""}, {"[monitor]\nca = fifo.tar", ""}, {"[sensor]\npublic_key = fifo.tar", "config"},
		{"", "call -ca fifo.tar https://127.0.0.1:1/ x"},
	} {
		test := test
		t.Run(test.config+" "+test.command, func(t *testing.T) {
			t.Parallel()
			b := newBox(t, test.config+"\n", nil)
			fifo(t, b.dir)
			p := start(t, self(t, b.dir, strings.Fields(test.command)...))
			if code := p.wait(t); code <= 0 || !strings.Contains(p.log.String(), "fifo") {
				t.Errorf("exit %d: %s", code, &p.log)
			}
		})
	}
	t.Run("reload", func(t *testing.T) {
		t.Parallel()
		b := newBox(t, "", nil)
		fifo(t, b.dir)
		p := b.start(t)
		writeTree(t, b.dir, map[string]string{"client.cfg": b.config + "certificate = fifo.tar\nkey = fifo.tar\n"})
		p.signal(t, syscall.SIGHUP)
		wantLog(t, &p.log, "reload: …fifo…stay in force")
		p.terminate(t)
	})
}

// TestFaultLocked: whoever can open the directory of client.cfg or of the sensors
// can lock it. The start, the end, a reload and runs do not wait for him.
func TestFaultLocked(t *testing.T) {
	for _, dir := range []string{".", "sensors"} {
		for _, locked := range []string{"start", "run"} {
			dir, locked := dir, locked
			t.Run(dir+" at the "+locked, func(t *testing.T) {
				t.Parallel()
				b := newBox(t, "", map[string]string{"sensors/s/check": printing(1)})
				b.next = newRecorder(t).url.String()
				lock := func() {
					f, err := os.Open(filepath.Join(b.dir, dir))
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { f.Close() })
					if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
						t.Fatal(err)
					}
				}
				if locked == "start" {
					lock()
				}
				p := b.start(t)
				mustCall(t, b.client, "healthcheck")
				if locked == "run" {
					lock()
				}
				wants(t, b.read(t, 1, "s"), "ticket 1: exit 0, value 1")
				mustCall(t, b.client, "cmd_update_sensor_code", "s") // which may wait for the lock
				if dir == "." {
					mustCall(t, b.client, "cmd_register_new_server") // so may that
				}
				p.signal(t, syscall.SIGHUP)
				wantLog(t, &p.log, "is in force; on")
				mustCall(t, b.client, "cmd_submit_reading", 2, "s")
				p.terminate(t)
			})
		}
	}
}

// TestFaultArguments: a queue full of commands with thousands of empty arguments
// does not kill a box of 16 MiB, from the first moment on, and calls beside them
// are answered.
func TestFaultArguments(t *testing.T) {
	for mode, arguments := range map[string]string{
		"string": "<string>" + strings.Repeat("'' ", 8192) + "</string>",
		"small":  "<string>" + strings.Repeat("'' ", 5300) + "</string>",
		"array":  "<array><data>" + strings.Repeat("<value/>", 4090) + "</data></array>",
	} {
		t.Run(mode, func(t *testing.T) {
			b := newBox(t, "queue = 256\n", map[string]string{"sensors/s/check": "#!/bin/sh\nsleep 2; echo 1"})
			p, limited := b.startTiny(t)
			if !limited {
				t.Skip("no memory cgroups on this machine")
			}
			full := make(chan string, 1)
			go func() {
				n, answer := 0, "OK"
				for ; n < 256 && strings.Contains(answer, "OK"); n++ { // till the queue is full, or one is refused
					body := string(encodeCall("cmd_submit_reading", n, "s", "ARGS"))
					body = strings.Replace(body, "<string>ARGS</string>", arguments, 1)
					resp, err := http.Post(b.client.url.String(), "text/xml", strings.NewReader(body))
					if err != nil {
						answer = err.Error()
						break
					}
					text, _ := io.ReadAll(resp.Body)
					resp.Body.Close()
					answer = string(text)
				}
				full <- fmt.Sprintf("%d commands, at last %.200s", n, answer)
			}()
			c := newClient(b.client.url, 10*time.Second, nil)
			defer c.close()
			for len(full) == 0 {
				mustCall(t, c, "healthcheck")
			}
			mustCall(t, c, "healthcheck")
			t.Logf("%s; peak of resident memory %d KiB", <-full, residentMemory(t, p.Process.Pid, "VmHWM"))
		})
	}
}

// TestFaultManySensors: a thousand sensors with long help texts are listed within
// the limits of a message, in 16 MiB.
func TestFaultManySensors(t *testing.T) {
	files := map[string]string{"help": strings.Repeat("<&> what it can be asked\n", 100)}
	for i := 0; i < 1000; i++ {
		files[fmt.Sprintf("sensors/%060d/check", i)] = "#!/bin/sh\ncat ../../help"
	}
	b := newBox(t, "", files)
	p, limited := b.startTiny(t)
	listed := mustCall(t, b.client, "cmd_list_sensors").(map[string]any)
	size := 0
	for name, help := range listed {
		text := len(encodeResponse(help, nil)) - len(encodeResponse("", nil))
		if text > 1<<10 {
			t.Errorf("the help of %s takes %d bytes", name, text)
		}
		size += len(name) + text
	}
	if size > 48<<10 || len(encodeResponse(listed, nil)) > 64<<10 || len(listed) < 100 {
		t.Errorf("%d sensors take %d bytes, the answer %d", len(listed), size, len(encodeResponse(listed, nil)))
	}
	wantLog(t, &p.log, "left out")
	t.Logf("%d sensors, limited: %v", len(listed), limited)
	p.terminate(t)
}

// BenchmarkBudgets measures what the agent takes, each figure beside a yardstick
// (testdata/bench) on the same machine in the same run, and prints a table:
//
//	go test -run '^$' -bench '^BenchmarkBudgets$' -benchtime 1x .
func BenchmarkBudgets(b *testing.B) {
	for i := 0; i < b.N; i++ {
		m := &bench{B: b, dir: b.TempDir()}
		m.build()
		fmt.Printf("%-58s %12s %12s %7s  %s\n", "figure", "picket", "yardstick", "ratio", "budget")
		m.size()
		m.started()
		m.loaded()
		m.acknowledged()
		m.backlog()
	}
}

const (
	benchReadings    = 10000
	benchRounds      = 3 // of what takes seconds; the figure is the median
	benchCallers     = 8
	benchConcurrency = 2 // runs of one sensor at once, as many as the yardstick's
)

// A bench has the programs that are measured, which are static, and a sensor.
type bench struct {
	*testing.B
	dir, picket, yardstick, sensor string
}

func (b *bench) build() {
	b.picket = build(b, b.dir)
	b.yardstick = goBuild(b, filepath.Join(b.dir, "yardstick"), "./testdata/bench")
	b.sensor = filepath.Join(b.dir, "sensors/s/check")
	writeTree(b, b.dir, map[string]string{"sensors/s/": ""})
	cc := exec.Command(program(b, "cc"), "-Os", "-static", "-o", b.sensor, "testdata/sensor.c")
	if out, err := cc.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
}

// row prints a row of the table.
func (b *bench) row(what string, picket, yardstick float64, budget string) {
	ratio := ""
	if yardstick > 0 {
		ratio = fmt.Sprintf("%.2f", picket/yardstick)
	}
	fmt.Printf("%-58s %12.2f %12.2f %7s  %s\n", what, picket, yardstick, ratio, budget)
}

// startPicket starts the agent with a monitor and with more in its client.cfg.
func (b *bench) startPicket(monitor, more string) (p *child, address string) {
	b.Helper()
	const config = "[monitor]\nurl = http://%s/xmlrpc/\n%s[sensor]\nconcurrency = %d\n[agent]\nlisten = 127.0.0.1:0\n"
	writeTree(b, b.dir, map[string]string{"client.cfg": fmt.Sprintf(config, monitor, more, benchConcurrency)})
	return b.start(b.picket, "-c", filepath.Join(b.dir, "client.cfg"))
}

// start starts a program and returns where it serves.
func (b *bench) start(name string, args ...string) (p *child, address string) {
	b.Helper()
	p = start(b, exec.Command(name, args...))
	return p, p.address(b)
}

func (b *bench) stop(p *child) {
	p.Process.Kill()
	p.wait(b)
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

func (b *bench) size() {
	kib := func(file string) float64 {
		info, err := os.Stat(file)
		if err != nil {
			b.Fatal(err)
		}
		return float64(info.Size()) / 1024
	}
	b.row("size of the binary, KiB", kib(b.picket), kib(b.yardstick), "<= 1.12")
}

// started measures what a program takes until and while it waits for the first call.
func (b *bench) started() {
	call := wireCall("healthcheck")
	first := func(start func() (*child, string)) (milliseconds, resident float64) {
		var times, sizes []float64
		for i := 0; i < 15; i++ {
			begun := time.Now()
			p, address := start()
			w := b.dial(address)
			w.exchange(call)
			times = append(times, float64(time.Since(begun).Microseconds())/1000)
			w.conn.Close()
			b.stop(p)
			p, _ = start()
			time.Sleep(100 * time.Millisecond) // it is idle
			sizes = append(sizes, float64(residentMemory(b, p.Process.Pid, "VmRSS")))
			b.stop(p)
		}
		return median(times), median(sizes)
	}
	time1, size1 := first(func() (*child, string) { return b.startPicket("127.0.0.1:1", "") })
	time2, size2 := first(func() (*child, string) { return b.start(b.yardstick, "listen") })
	b.row("resident memory, idle, KiB", size1, size2, "<= 1.15")
	b.row("from exec to first answer, ms", time1, time2, "<= 1.3")
}

// loaded measures 10,000 readings that 8 callers ask for.
func (b *bench) loaded() {
	m := b.monitor()
	var rate, cpu, rate2, cpu2 []float64
	private := 0
	for i := 0; i < benchRounds; i++ {
		p, address := b.startPicket(m.address(), "")
		calls := submitCalls(benchReadings)
		before := b.processTime(p)
		begun := time.Now()
		b.load(address, calls, 0)
		m.await(b, benchReadings)
		rate = append(rate, benchReadings/time.Since(begun).Seconds())
		cpu = append(cpu, (b.processTime(p)-before)/benchReadings*1e6)
		private = max(private, residentMemory(b, p.Process.Pid, "RssAnon"))
		b.stop(p)
		begun = time.Now()
		out, err := exec.Command(b.yardstick, "loop", b.sensor, fmt.Sprint(benchReadings)).Output()
		if err != nil {
			b.Fatal(err)
		}
		rate2 = append(rate2, benchReadings/time.Since(begun).Seconds())
		nanoseconds, _ := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
		cpu2 = append(cpu2, nanoseconds/1000/benchReadings)
	}
	b.row("private memory after 10,000 readings, KiB", float64(private), 0, "<= 4608")
	b.row("readings per second, two at once", median(rate), median(rate2), ">= 0.66")
	b.row("processor time per reading, children included, us", median(cpu), median(cpu2), "<= 1.4")
}

// processTime is the processor time in seconds that a process and its children
// have taken.
func (b *bench) processTime(p *child) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	ticks := 0
	for _, field := range strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))[11:15] {
		n, _ := strconv.Atoi(field)
		ticks += n
	}
	return float64(ticks) / 100
}

// load has 8 callers ask for readings, at so many a second (0: as fast as it
// goes), and returns the 99th percentile of how long an answer took, in
// microseconds.
func (b *bench) load(address string, calls [][]byte, rate float64) float64 {
	took := make([]float64, len(calls))
	var all sync.WaitGroup
	for i := 0; i < benchCallers; i++ {
		all.Add(1)
		go func(i int) {
			defer all.Done()
			w := b.dial(address)
			defer w.conn.Close()
			begun := time.Now()
			for k := i; k < len(calls); k += benchCallers {
				if rate > 0 {
					time.Sleep(time.Until(begun.Add(time.Duration(float64(k) / rate * 1e9))))
				}
				sent := time.Now()
				w.exchange(calls[k])
				took[k] = float64(time.Since(sent).Nanoseconds()) / 1000
			}
		}(i)
	}
	all.Wait()
	slices.Sort(took)
	return took[len(took)*99/100]
}

// acknowledged measures how long an acknowledgement takes under a fifth of the
// highest load.
func (b *bench) acknowledged() {
	const n, rate = 2400, 300
	m := b.monitor()
	var picket, yardstick []float64
	for i := 0; i < benchRounds; i++ {
		p, address := b.startPicket(m.address(), "")
		picket = append(picket, b.load(address, submitCalls(n), rate))
		m.await(b, n)
		b.stop(p)
		p, address = b.start(b.yardstick, "serve", b.sensor)
		yardstick = append(yardstick, b.load(address, submitCalls(n), rate))
		b.stop(p)
	}
	b.row("acknowledgement, 99th percentile at 300 a second, us", median(picket), median(yardstick), "<= 2.0")
}

// backlog measures how fast readings go out that had to wait for the monitor,
// from the first that arrives to the last.
func (b *bench) backlog() {
	var picket, yardstick []float64
	body := string(encodeCall("cmd_store_probe_data", 12345, []any{0, "42"}, dateTime("20261122T20:43:21")))
	for i := 0; i < benchRounds; i++ {
		m := b.monitor()
		m.away.Store(true)
		p, address := b.startPicket(m.address(), "spool = spool\nspool_size = 4M\n")
		b.load(address, submitCalls(benchReadings), 0)
		await(b, "all are in the spool", func() bool {
			text, _ := os.ReadFile(filepath.Join(b.dir, "spool/readings")) // later there is one
			return bytes.Count(text, []byte(" r ")) >= benchReadings
		})
		m.away.Store(false)
		picket = append(picket, m.await(b, benchReadings))
		b.stop(p)
		if err := os.RemoveAll(filepath.Join(b.dir, "spool")); err != nil {
			b.Fatal(err)
		}
		m = b.monitor()
		p = start(b, exec.Command(b.yardstick, "send", "http://"+m.address()+"/xmlrpc/", fmt.Sprint(benchReadings), body))
		yardstick = append(yardstick, m.await(b, benchReadings))
		p.wait(b)
	}
	b.row("a backlog of 10,000 readings, per second", median(picket), median(yardstick), ">= 0.6")
}

// wireCall is a call as it is sent.
func wireCall(method string, params ...any) []byte {
	body := encodeCall(method, params...)
	return withLength("POST /xmlrpc/ HTTP/1.1\r\nHost: x\r\nContent-Type: text/xml", body)
}

// withLength is a message of these lines, of Content-Length and of the body.
func withLength(lines string, body []byte) []byte {
	return []byte(fmt.Sprintf("%s\r\nContent-Length: %d\r\n\r\n%s", lines, len(body), body))
}

// submitCalls are so many calls that ask for a reading, made before anything is measured.
func submitCalls(n int) [][]byte {
	calls := make([][]byte, n)
	for i := range calls {
		calls[i] = wireCall("cmd_submit_reading", i, "s")
	}
	return calls
}

// A wire is a connection that takes as little as possible of the processor that
// the agent is on.
type wire struct {
	b    *bench
	conn net.Conn
	r    *bufio.Reader
}

func (b *bench) dial(address string) *wire {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		b.Fatal(err)
	}
	return &wire{b, conn, bufio.NewReader(conn)}
}

// exchange sends a request and reads the answer.
func (w *wire) exchange(request []byte) {
	_, err := w.conn.Write(request)
	line, err2 := readMessage(w.r)
	if err != nil || err2 != nil || !strings.Contains(line, " 200 ") {
		w.b.Errorf("got %q, %v, %v", line, err, err2)
	}
}

// readMessage reads a HTTP message with a Content-Length, and returns its first line.
func readMessage(r *bufio.Reader) (first string, err error) {
	for length := 0; ; {
		line, err := r.ReadString('\n')
		if err != nil {
			return "", err
		}
		if first == "" {
			first = line
		}
		if rest, ok := strings.CutPrefix(line, "Content-Length: "); ok {
			length, _ = strconv.Atoi(strings.TrimSpace(rest))
		}
		if line == "\r\n" {
			_, err = r.Discard(length)
			return first, err
		}
	}
}

// A wireMonitor takes readings, and counts them.
type wireMonitor struct {
	listener net.Listener
	away     atomic.Bool
	stored   chan struct{}
}

func (b *bench) monitor() *wireMonitor {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	m := &wireMonitor{listener: l, stored: make(chan struct{}, 2*benchReadings)}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go m.answer(conn)
		}
	}()
	return m
}

func (m *wireMonitor) answer(conn net.Conn) {
	defer conn.Close()
	yes := withLength("HTTP/1.1 200 OK\r\nContent-Type: text/xml", encodeResponse(true, nil))
	no := withLength("HTTP/1.1 503 Service Unavailable", nil)
	for r := bufio.NewReader(conn); ; {
		if _, err := readMessage(r); err != nil {
			return
		}
		if m.away.Load() {
			conn.Write(no)
			continue
		}
		conn.Write(yes)
		m.stored <- struct{}{}
	}
}

func (m *wireMonitor) address() string { return m.listener.Addr().String() }

// await waits for n readings, and returns how many a second there were from the
// first to the last.
func (m *wireMonitor) await(b *bench, n int) float64 {
	b.Helper()
	receive(b, "the first reading", m.stored)
	begun := time.Now()
	for i := 1; i < n; i++ {
		receive(b, fmt.Sprintf("reading %d", i), m.stored)
	}
	return float64(n) / time.Since(begun).Seconds()
}

// BenchmarkReading is the whole way of a reading: command, sensor, monitor.
func BenchmarkReading(b *testing.B) {
	box := newBox(b, "queue = 65536\n", map[string]string{"sensors/s/check": printing(42)})
	box.run(b)
	b.ReportAllocs()
	b.ResetTimer()
	go func() {
		for i := 0; i < b.N; i++ {
			if _, err := box.client.call(context.Background(), "cmd_submit_reading", i, "s"); err != nil {
				b.Error(err)
			}
		}
	}()
	for i := 0; i < b.N; i++ {
		receive(b, "reading", box.readings)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "readings/s")
}

func BenchmarkDecodeCall(b *testing.B) {
	message := encodeCall("cmd_submit_reading", 7, "disk", []any{"percent", "/"})
	b.ReportAllocs()
	b.SetBytes(int64(len(message)))
	for i := 0; i < b.N; i++ {
		if _, _, err := decodeCall(message); err != nil {
			b.Fatal(err)
		}
	}
}
