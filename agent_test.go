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
	if err := makeFiles(dir, map[string]string{name + "/check": "#!/bin/sh\n" + script + "\n"}); err != nil {
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
	return newSensors(dir, "check", "options", patience, nil)
}

// A recorder is a monitor that keeps what it gets, and misbehaves on demand.
type recorder struct {
	*monitor // has packages and the next monitor, as a test wants them
	url      *url.URL
	readings chan storedReading
	tries    atomic.Int64

	mu        sync.Mutex
	misbehave func(w http.ResponseWriter, try int) bool // reports whether it has answered
}

func newRecorder(t testing.TB) *recorder {
	m := &recorder{readings: make(chan storedReading, 10000)}
	m.monitor = &monitor{stored: func(s storedReading) error { m.readings <- s; return nil }}
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
	for i, line := range c.lines {
		key := line.key
		switch value, err := c.get(key.section, key.option); {
		case c.values[key].line != i+1: // a comment, or overridden
		case key.option == "":
			fmt.Fprintf(&b, "[%s]\n", key.section)
		case err != nil:
			fmt.Fprintf(&b, "%s: %v\n", key.option, err)
		default:
			fmt.Fprintf(&b, "%s = %q\n", key.option, value)
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
	if _, err := parseINI("x", strings.Repeat("x\n", 30)); len(strings.Split(err.Error(), "\n")) != maxBadLines {
		t.Errorf("got %v; want the first twenty bad lines", err)
	}
}

// TestINIPython compares with the two parsers that these files were written
// for, as far as the dialects agree.
func TestINIPython(t *testing.T) {
	compare := func(python, file string) {
		c, err := readINI(file)
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for k := range c.values {
			v, err := c.get(k.section, k.option)
			if err != nil {
				v = "ERROR"
			}
			if k.option != "" {
				lines = append(lines, fmt.Sprintf("%s|%s|%s\n", k.section, k.option, strings.ReplaceAll(v, "\n", `\n`)))
			}
		}
		slices.Sort(lines)
		want, err := exec.Command(python, "testdata/ini/values.py", file).Output()
		if got := strings.Join(lines, ""); err != nil || got != string(want) || len(lines) < 10 {
			t.Errorf("%s: got\n%s\nwant as %s\n%s, %v", file, got, python, want, err)
		}
	}
	if python2 := findPython2(); python2 != "" {
		compare(python2, "testdata/ini/classic.ini")
		compare(python2, "testdata/ini/interpolation.ini")
	}
	// What picket wrote, Python 3 reads; it has no rem lines and no "".
	c := &ini{values: make(map[iniKey]iniValue)}
	for i, value := range []string{"", "plain", "100%", "%(none)s", "two\nlines", "a:b=c", "ü", "x;y", "[x]"} {
		if err := c.set("section", fmt.Sprint("Option", i), value); err != nil {
			t.Error(err)
		}
	}
	if err := c.set(defaults, "d", "default"); err != nil {
		t.Error(err)
	}
	file := filepath.Join(t.TempDir(), "written.ini")
	if err := os.WriteFile(file, []byte(c.text()), 0o600); err != nil {
		t.Fatal(err)
	}
	compare(program(t, "python3"), file)
}

func TestINIEdit(t *testing.T) {
	plain := strings.NewReplacer(`\r`, "\r", `\n`, "\n", `\t`, "\t", `\BOM`, byteMark, "\\\n", "")
	for _, test := range cases(t, "testdata/edits.txt") {
		before, after, _ := strings.Cut(plain.Replace(test.text), "=>\n")
		c, err := parseINI("x.ini", before)
		if err != nil {
			t.Fatal(err)
		}
		if words := strings.Split(plain.Replace(test.name), "|"); len(words) == 3 {
			err = c.set(words[0], words[1], words[2])
		} else {
			err = c.remove(words[0], words[1:]...)
		}
		switch {
		case after != "" && (err != nil || c.text() != after):
			t.Errorf("%s in %q: got %q, %v; want %q", test.name, before, c.text(), err, after)
		case after == "" && (err == nil || c.text() != before):
			t.Errorf("%s in %q: got %q, %v; want an error and nothing changed", test.name, before, c.text(), err)
		}
	}
}

// TestSettings checks texts of client.cfg, and the defaults.
func TestSettings(t *testing.T) {
	for _, test := range cases(t, "testdata/settings.txt") {
		text, want, _ := strings.Cut(strings.ReplaceAll(test.text, "EUID", strconv.Itoa(os.Geteuid())), "=>\n")
		c, err := parseINI("c.cfg", text)
		if err != nil {
			t.Fatal(err)
		}
		_, warnings, err := c.settings("/dir")
		got := strings.Join(warnings, "\n") + "\n"
		if err != nil {
			got = err.Error() + "\n" + got
		}
		if strings.Trim(got, "\n") != strings.Trim(want, "\n") {
			t.Errorf("%s: got\n%s\nwant\n%s", test.name, got, want)
		}
	}
	want := settings{
		executable: "check", help: "options", path: "/dir/sensors", backup: "/dir/sensors_backup",
		timeout: 30 * time.Second, concurrency: 4, update: true, keep: 3, maxPackage: 4 << 20, maxUnpacked: 16 << 20,
		monitor:        &url.URL{Scheme: "http", Host: "localhost:8081", Path: "/xmlrpc/"},
		monitorTimeout: 15 * time.Second, noValue: "nan", spoolSize: 1 << 20, listen: ":8080", queue: 256,
	}
	if got, _, err := (&ini{}).settings("/dir"); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	c, err := parseINI("c.cfg", "[sensor]\ntimeout = 2h\n[agent]\nallow = 10.0.0.5/8,::ffff:10.1.2.3\n")
	if err != nil {
		t.Fatal(err)
	}
	s, _, err := c.settings("")
	if got := fmt.Sprint(s.timeout, s.allow, err); got != "1h0m0s [10.0.0.0/8 10.1.2.3/32] <nil>" {
		t.Errorf("got %s; want at most an hour, and IPv4", got)
	}
}

// TestLost: each protection that goes away is named.
func TestLost(t *testing.T) {
	s := settings{user: &sensorUser{}, publicKey: "k", allow: make([]netip.Prefix, 1), listen: "10.0.0.1:80"}
	s.monitorTLS.ca, s.agentTLS = "c", tlsFiles{certificate: "c", ca: "c", name: "n"}
	for want, change := range map[string]func(*settings){
		"[sensor] user":                 func(s *settings) { s.user = nil },
		"[sensor] update = no":          func(s *settings) { s.update = true },
		"[sensor] public_key":           func(s *settings) { s.publicKey = "" },
		"[monitor] ca":                  func(s *settings) { s.monitorTLS.ca = "" },
		"[agent] allow":                 func(s *settings) { s.allow = nil },
		"[agent] listen on one address": func(s *settings) { s.listen = "[::]:80" },
		"[agent] certificate":           func(s *settings) { s.agentTLS.certificate = "" },
		"[agent] client_ca":             func(s *settings) { s.agentTLS.ca = "" },
		"[agent] client_name":           func(s *settings) { s.agentTLS.name = "" },
		"":                              func(s *settings) { s.allow, s.publicKey, s.listen = make([]netip.Prefix, 2), "other", "localhost:80" },
	} {
		next := s
		change(&next)
		if got := strings.Join(s.lost(&next), ", "); got != want || len(next.lost(&s)) > 0 {
			t.Errorf("got %q, and %q the other way round; want %q", got, next.lost(&s), want)
		}
	}
	empty, _, _ := (&ini{}).settings("")
	if got := s.lost(&empty); len(got) != 9 {
		t.Errorf("an empty client.cfg: got %q; want all", got)
	}
}

// TestIrregular: a FIFO, a socket, a device or a directory in the place of a
// file is an error that names the option. Nothing waits for it.
func TestIrregular(t *testing.T) {
	dir := t.TempDir()
	plain, fifo, socket := filepath.Join(dir, "plain"), filepath.Join(dir, "fifo"), filepath.Join(dir, "socket")
	l, err := net.Listen("unix", socket)
	if err := errors.Join(err, syscall.Mkfifo(fifo, 0o600), os.WriteFile(plain, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, file := range []string{dir, fifo, socket, "/dev/zero"} {
		want := file + ": not a regular file"
		if _, err := readINI(file); err == nil || err.Error() != want {
			t.Errorf("got %v; want %s", err, want)
		}
		for text, option := range map[string]string{
			"[monitor]\nca = FILE":                         "[monitor] ca",
			"[agent]\nclient_ca = FILE":                    "[agent] client_ca",
			"[agent]\ncertificate = FILE\nkey = PLAIN":     "[agent] certificate",
			"[monitor]\nkey = FILE\ncertificate = PLAIN\n": "[monitor] key",
		} {
			c, err := parseINI("c.cfg", strings.NewReplacer("FILE", file, "PLAIN", plain).Replace(text))
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = c.settings("")
			if want := "c.cfg:2: " + option + ": " + want; err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("got %v; want %s", err, want)
			}
		}
	}
}

// TestShippedConfig: client.cfg shows every option with its default, and the
// README explains it. Whoever follows the README sets values in it; those may differ.
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
		for _, o := range known {
			if _, shown := c.raw(o.section, o.name); name == "with every default" && !shown {
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

// TestEditINI: of changes at once none is lost. The file keeps its owner, its
// mode and the link to it. No link is followed that somebody planted where the
// new content is written first. What fails changes nothing.
func TestEditINI(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target.cfg"), filepath.Join(dir, "client.cfg")
	writeTree(t, dir, map[string]string{"target.cfg": "[a]\nx = 1\n", "victim": "untouched"})
	plant := func() error { return os.Symlink("victim", nextFile(target)) }
	if err := errors.Join(os.Chmod(target, 0o640), os.Symlink("target.cfg", link), plant()); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(target, 12, 34); err != nil {
			t.Fatal(err)
		}
	}
	about := func() string {
		info, err := os.Stat(target)
		to, err2 := os.Readlink(link)
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		owner := info.Sys().(*syscall.Stat_t)
		return fmt.Sprint(info.Mode(), owner.Uid, owner.Gid, to)
	}
	before := about()
	edit := func(ctx context.Context, option string) error {
		return editINI(ctx, link, func(c *ini) error { return c.set("a", option, "1") })
	}
	var done sync.WaitGroup
	for i := 0; i < 20; i++ {
		done.Add(1)
		go func(i int) {
			defer done.Done()
			if err := edit(context.Background(), fmt.Sprint("y", i)); err != nil {
				t.Error(err)
			}
		}(i)
	}
	done.Wait()
	c, err := readINI(target)
	if err != nil || len(c.values) != 22 || about() != before {
		t.Errorf("got %v, %v, %s; want 21 values and their section, %s", c.values, err, about(), before)
	}

	lock, err := os.Open(dir)
	if err == nil {
		err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := edit(short, "z"); err == nil || !strings.Contains(err.Error(), "another process holds it") {
		t.Errorf("a lock that another process holds: got %v", err)
	}
	if err := recoverINI(link); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("recover, with a lock that another process holds: got %v", err)
	}
	lock.Close()
	if err := plant(); err != nil || replaceFile(target, []byte("x")) == nil {
		t.Errorf("%v, or no error where a link was planted meanwhile", err)
	}
	if err := recoverINI(link); err != nil {
		t.Error(err)
	}
	want := map[string]string{"target.cfg": c.text(), "victim": "untouched", "client.cfg": c.text()}
	if got := readTree(t, dir); !reflect.DeepEqual(got, want) {
		t.Errorf("got %q; want %q", got, want)
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
		if err := c.remove(section, option); err != nil {
			t.Fatal(err)
		}
		if _, own := c.values[iniKey{section, strings.ToLower(option)}]; own {
			t.Fatal("still there")
		}
	})
}

func TestSensorName(t *testing.T) {
	for _, good := range []string{"disk", "a", "CPU load", "ünïcode", "-x", "a.b", "a\\b", strings.Repeat("x", maxName)} {
		if got, err := sensorName(good); got != good || err != nil {
			t.Errorf("%q: got %q, %v", good, got, err)
		}
	}
	bad := []any{"", ".", "..", "a/b", "/", "../x", ".hidden", "a\x00", "a\nb", "\xff", strings.Repeat("x", maxName+1), 7, nil, []any{"disk"}}
	for _, bad := range bad {
		if got, err := sensorName(bad); err == nil {
			t.Errorf("%q: got %q; want an error", bad, got)
		}
	}
	if backup := "." + strings.Repeat("x", maxName) + "_2010-03-07T21:24:33"; len(backup) != 255 {
		t.Errorf("a backup's name has %d bytes; want the 255 that fit", len(backup))
	}
}

func TestArguments(t *testing.T) {
	good := []struct {
		v    any
		want []string
	}{
		{nil, nil},
		{"", nil},
		{"percent /", []string{"percent", "/"}},
		{[]any{}, nil},
		{[]any{"used /", "", " x "}, []string{"used /", "", " x "}},
		{
			[]any{7, int64(-5e9), 2.5, true, false, dateTime("20261122T20:43:21"), []byte("abc")},
			[]string{"7", "-5000000000", "2.5", "1", "0", "20261122T20:43:21", "abc"},
		},
		{strings.Repeat("'' ", 512), make([]string, 512)},
		{[]any{strings.Repeat("x", maxArguments-16)}, []string{strings.Repeat("x", maxArguments-16)}},
	}
	for _, test := range good {
		if got, err := arguments(test.v); err != nil || !slices.Equal(got, test.want) {
			t.Errorf("%v: got %q, %v; want %q", test.v, got, err, test.want)
		}
	}
	var tooMany []any
	for i := 0; i < 513; i++ {
		tooMany = append(tooMany, "")
	}
	bad := []any{
		7, true, map[string]any{}, []any{nil}, []any{[]any{}}, []any{[]byte{0}}, "'",
		strings.Repeat("x", maxArguments-15), strings.Repeat(" ", maxArguments+1), strings.Repeat("'' ", 513),
		[]any{strings.Repeat("x", maxArguments-15)}, tooMany,
	}
	for _, bad := range bad {
		if got, err := arguments(bad); err == nil {
			t.Errorf("%v: got %q; want an error", bad, got)
		}
	}
}

func TestSplitWords(t *testing.T) {
	for _, c := range cases(t, "testdata/sensors/words.txt") {
		words, err := splitWords(strings.TrimSuffix(c.text, "\n"))
		got := fmt.Sprintf("%q", words)
		if err != nil {
			got = "error"
		}
		if got != c.name {
			t.Errorf("%q: got %s; want %s", c.text, got, c.name)
		}
	}
}

// TestSplitWordsShell compares with the shell itself, where it expands nothing.
func TestSplitWordsShell(t *testing.T) {
	const letters = "ab '\"\\ \t"
	compared := 0
	for n := 0; n < 500; n++ { // every length up to 7, the same each time
		var b strings.Builder
		for i, x := 0, uint32(n)*2654435761; i < n%8; i++ {
			b.WriteByte(letters[x%uint32(len(letters))])
			x /= uint32(len(letters))
		}
		got, err := splitWords(b.String())
		if err != nil || len(got) == 0 {
			continue // the shell waits for more, or takes set -- without words
		}
		out, err := exec.Command("/bin/sh", "-c", "set -- "+b.String()+"\nprintf '<%s>' \"$@\"").Output()
		if want := "<" + strings.Join(got, "><") + ">"; err != nil || string(out) != want {
			t.Errorf("%q: got %q; the shell has %q, %v", b.String(), want, out, err)
		}
		compared++
	}
	if compared < 100 {
		t.Errorf("compared %d only", compared)
	}
}

func TestReading(t *testing.T) {
	for _, c := range cases(t, "testdata/sensors/readings.txt") {
		r := testSensors(t, c.text).read(context.Background(), "s", []string{"1 2", "*"}, nil)
		if r.value == "" {
			r.value = "nan"
		}
		if got := strings.TrimSpace(fmt.Sprint(r.code, " ", r.value, " ", r.reason)); got != c.name {
			t.Errorf("%s: got %s; want %s", c.text, got, c.name)
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
		{put("#!/bin/sh\necho 1\n", 0o644), "126 start " + file + ": permission denied"},
		{put("#!/bin/sh\r\necho 1\r\n", 0o755), "126 start " + file + ": interpreter not found: does the file have Windows line ends?"},
		{put("echo 1\n", 0o755), "126 start " + file + ": exec format error"},
		{put("\x7fELF\x02\x01\x01", 0o755), "126 start " + file + ": exec format error"},
		{put("", 0o755), "126 start " + file + ": exec format error"},
	} {
		if test.got != test.want {
			t.Errorf("got %q; want %q", test.got, test.want)
		}
	}
	os.Remove(file)
	writeTree(t, s.path, map[string]string{"s/check/": "", "empty/": "", "file": ""})
	for name, want := range map[string]string{"s": "126 ", "empty": "127 no such sensor", "file": "127 no such sensor"} {
		if got := read(name); !strings.HasPrefix(got, want) {
			t.Errorf("%s: got %q; want %q", name, got, want)
		}
	}
	if s.running() != 0 {
		t.Errorf("%d run; want none", s.running())
	}
}

// TestReadingQuick: nothing that a sensor writes is lost, whenever it ends, and
// no file is left open.
func TestReadingQuick(t *testing.T) {
	s := testSensors(t, "printf 1; sleep $1; printf 2; echo x >&2; exit 3")
	files := openFiles(t)
	for i := 0; i < 40; i++ {
		r := s.read(context.Background(), "s", []string{fmt.Sprintf("0.%03d", i/2)}, nil)
		if r.code != 3 || r.value != "12" || r.reason != `"x"` {
			t.Errorf("%d ms: got %+v", i/2, r)
		}
	}
	await(t, "all files are closed", func() bool { return openFiles(t) <= files })
}

// TestReadingMeanwhile: a sensor that is still open for writing is tried again
// until it is closed, and one that is away while a new version is there until
// that is in its place.
func TestReadingMeanwhile(t *testing.T) {
	s := testSensors(t, "echo 1")
	f, err := os.OpenFile(filepath.Join(s.path, "s", "check"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { f.Close() })
	if r := s.read(context.Background(), "s", nil, nil); r.value != "1" {
		t.Errorf("got %+v", r)
	}
	next := filepath.Join(s.path, newPrefix+"s")
	if err := os.Rename(filepath.Join(s.path, "s"), next); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { os.Rename(next, filepath.Join(s.path, "s")) })
	if r := s.read(context.Background(), "s", nil, nil); r.value != "1" {
		t.Errorf("got %+v", r)
	}
}

// TestReadingOneVersion: an interpreter reads the script that it was started for,
// although another directory has the sensor's name by then.
func TestReadingOneVersion(t *testing.T) {
	s := testSensors(t, "")
	interpreter := filepath.Join(t.TempDir(), "interpreter")
	writeTree(t, filepath.Dir(interpreter), map[string]string{
		"interpreter": "#!/bin/sh\nmv ../s ../moved; mkdir ../s; echo 'echo 2' >../s/check; exec sh \"$1\"\n",
	})
	writeTree(t, s.path, map[string]string{"s/check": "#!" + interpreter + "\necho 1\n"})
	if r := s.read(context.Background(), "s", nil, nil); r.value != "1" {
		t.Errorf("got %+v; want the first version's 1", r)
	}
}

// TestRetire: who replaces a sensor waits for the runs of the version before,
// and for no others.
func TestRetire(t *testing.T) {
	s := testSensors(t, "until [ -e $1 ]; do sleep 0.01; done; echo 1")
	receive(t, "nothing runs", s.retire("s"))
	read := func(gate string) <-chan reading {
		before, done := s.running(), make(chan reading, 1)
		go func() { done <- s.read(context.Background(), "s", []string{gate}, nil) }()
		await(t, "it runs", func() bool { return s.running() > before })
		return done
	}
	first := read("1")
	over := s.retire("s")
	second := read("2")
	writeTree(t, s.path, map[string]string{"s/2": ""})
	receive(t, "the second", second)
	select {
	case <-over:
		t.Error("the first run is not over")
	default:
	}
	writeTree(t, s.path, map[string]string{"s/1": ""})
	receive(t, "the first", first)
	receive(t, "the end of the version", over)
}

// TestReadingLeavesNothing: whatever a sensor starts, its reading does not
// wait for it, and what stays in the process group is killed.
func TestReadingLeavesNothing(t *testing.T) {
	word := mark(t)
	tests := []struct {
		script  string
		timeout time.Duration
		want    string
	}{
		{"sleep 300 & echo 1", patience, "0 1"},
		{"setsid sleep 300 & echo 1", patience, "0 1"},
		{"(sleep 300 &) ; echo 1; exit 3", patience, "3 1"},
		{"trap '' HUP TERM; sleep 300 & sleep 300 & echo 1", patience, "0 1"},
		{"sleep 300; true", 100 * time.Millisecond, "-15 "},
		{"(sleep 300)", 100 * time.Millisecond, "-15 "},
		{"sleep 300 | cat", 100 * time.Millisecond, "-15 "},
		{"echo 1; exec >&- 2>&-; sleep 300", 100 * time.Millisecond, "-15 "},
		{"trap 'echo 1; exit 0' TERM; sleep 300 & wait", 500 * time.Millisecond, "-15 "},
		{"exec yes", 100 * time.Millisecond, "-15 "},
		{"trap '' TERM; while :; do sleep 300; done", 500 * time.Millisecond, "-9 "},
		{"exec " + program(t, "perl") + " -e 'setpgrp(0, getpgrp(getppid())); sleep 300'", 500 * time.Millisecond, "-15 "},
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
			if got := fmt.Sprint(r.code, " ", r.value); got != test.want {
				t.Errorf("%q: got %s, %s; want %s", test.script, got, r.reason, test.want)
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

// TestReadingInterrupted: what ends the agent ends a sensor. What it says goes
// through a pipe, although a file would do.
func TestReadingInterrupted(t *testing.T) {
	s := testSensors(t, "[ -p /proc/self/fd/2 ] && echo started >&2; sleep 300")
	said, err := os.Create(filepath.Join(t.TempDir(), "said"))
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close()
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		await(t, "the sensor says it", func() bool {
			text, err := os.ReadFile(said.Name())
			return err != nil || string(text) == "started\n"
		})
		cancel()
	}()
	for _, stderr := range []io.Writer{said, nil} {
		if r := s.read(ctx, "s", nil, stderr); r.code != -15 || r.reason != "interrupted" {
			t.Errorf("got %+v", r)
		}
	}
}

// TestReadingStuck: while a process is left that SIGKILL did not end, the
// sensor is not started again.
func TestReadingStuck(t *testing.T) {
	s := testSensors(t, "echo 1")
	p := s.add("s")
	p.stuck = true
	if r := s.read(context.Background(), "s", nil, nil); r.code != codeNotStarted || !strings.Contains(r.reason, "cannot be killed") {
		t.Errorf("got %+v", r)
	}
	s.remove(p)
	if r := s.read(context.Background(), "s", nil, nil); r.code != 0 {
		t.Errorf("got %+v", r)
	}
}

// TestReadingUser: sensors run as somebody else, with his groups only and with
// his home.
func TestReadingUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can run sensors as another user")
	}
	const daemon, nobodys = "1 1 1 daemon daemon his", "54321 54321 54321 54321 54321 /"
	for name, want := range map[string]string{"daemon": daemon, "1": daemon, "54321": nobodys} {
		user, err := otherUser(name)
		if err != nil {
			t.Fatal(err)
		}
		s := testSensors(t, "[ $HOME != ~daemon ] || HOME=his; echo $(id -u) $(id -g) $(id -G) $USER $LOGNAME $HOME >&2; exit 1")
		forEverybody(t, s.path)
		s.credential, s.env = user.credential, sensorEnv(user)
		if r := s.read(context.Background(), "s", nil, nil); r.reason != strconv.Quote(want) {
			t.Errorf("%s: got %+v; want %s", name, r, want)
		}
	}
}

// forEverybody lets other users into a temporary directory.
func forEverybody(t *testing.T, dir string) {
	t.Helper()
	for ; dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// TestReadingLocale: a decimal point is a point, and all else is as it was.
func TestReadingLocale(t *testing.T) {
	for _, test := range []struct{ all, want string }{
		{"", "LANG=xx LC_NUMERIC=C LC_TIME=tt "},
		{"aa", "LANG=aa LC_NUMERIC=C "},
	} {
		t.Setenv("LANG", "xx")
		t.Setenv("LC_TIME", "tt")
		t.Setenv("LC_NUMERIC", "nn")
		t.Setenv("LC_ALL", test.all)
		s := testSensors(t, "env | grep -E '^(LANG|LC_[A-Z]*)=.' | sort | tr '\\n' ' ' >&2; exit 1")
		if r := s.read(context.Background(), "s", nil, nil); r.reason != strconv.Quote(strings.TrimSpace(test.want)) {
			t.Errorf("LC_ALL=%s: got %s; want %s", test.all, r.reason, test.want)
		}
	}
}

// TestOrphans: as process 1 the agent reaps what sensors leave, and no reading
// gets the exit code of an orphan.
func TestOrphans(t *testing.T) {
	unshare := program(t, "unshare")
	if os.Geteuid() != 0 {
		t.Skip("not root")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	m := newRecorder(t)
	const orphans = "for i in 1 2 3; do (setsid sh -c 'sleep 0.01; exit 9' &); (sleep 300 &); done"
	writeSensor(t, filepath.Join(dir, "sensors"), "s", orphans+"; echo $1; exit $2")
	writeTree(t, dir, map[string]string{"client.cfg": fmt.Sprintf("[monitor]\nurl = %s\n[agent]\nlisten = 127.0.0.1:0\n", m.url)})
	cmd := exec.Command(unshare, "--pid", "--fork", "--kill-child", self)
	c := startIn(t, dir, cmd).client(t)
	const n = 60
	for i := 0; i < n; i++ {
		mustCall(t, c, "cmd_submit_reading", i, "s", []any{i, i % 2 * 3})
	}
	for i := 0; i < n; i++ {
		s := receive(t, "reading", m.readings)
		if got, want := fmt.Sprint(s.code, " ", s.value), fmt.Sprint(s.ticket.(int)%2*3, " ", s.ticket); got != want {
			t.Errorf("got %s; want %s", got, want)
		}
	}
	agent := childrenOf(t, cmd.Process.Pid)
	if len(agent) != 1 {
		t.Fatalf("unshare has %d children; want the agent", len(agent))
	}
	await(t, "all orphans are reaped", func() bool { return len(childrenOf(t, agent[0])) == 0 })
}

// childrenOf lists the children of a process, zombies too.
func childrenOf(t *testing.T, parent int) (pids []int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, _ := os.ReadFile(file) // it may have ended
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		if len(fields) > 1 && fields[1] == strconv.Itoa(parent) {
			pid, _ := strconv.Atoi(strings.Split(file, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestProcessLimit: a sensor uses up all processes that the agent's user may
// have. The agent, which needs threads, goes on; sensors start again afterwards.
func TestProcessLimit(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root")
	}
	const uid = 54321
	word := mark(t)
	dir := t.TempDir()
	m := newRecorder(t)
	sensors := filepath.Join(dir, "sensors")
	writeSensor(t, sensors, "s", "echo 1")
	writeSensor(t, sensors, "greedy", "(while sleep 300 & do :; done); : >full; exec sleep 300")
	config := "[sensor]\nconcurrency = 8\ntimeout = 3s\n[agent]\nlisten = 127.0.0.1:0\n[monitor]\nspool = spool\n"
	writeTree(t, dir, map[string]string{"client.cfg": config + "url = " + m.url.String() + "\n"})
	for _, d := range []string{dir, filepath.Join(sensors, "greedy")} {
		if err := os.Chown(d, uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	forEverybody(t, filepath.Join(sensors, "greedy"))
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	cmd := exec.Command("/proc/self/fd/3") // whose directory is not for everybody
	cmd.ExtraFiles = []*os.File{self}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	var before syscall.Rlimit
	if err := syscall.Getrlimit(rlimitProcesses, &before); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(rlimitProcesses, &syscall.Rlimit{Cur: 60, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	agent := startIn(t, dir, cmd)
	syscall.Setrlimit(rlimitProcesses, &before)
	c := agent.client(t)
	defer func() {
		for _, pid := range marked(t, word) {
			syscall.Kill(pid, syscall.SIGKILL) // which the agent would have done
		}
		await(t, "no process is left", func() bool { return len(marked(t, word)) == 0 })
		if t.Failed() {
			t.Log(&agent.log)
		}
	}()
	mustCall(t, c, "cmd_submit_reading", 0, "greedy")
	await(t, "no process is left to start", func() bool { _, err := os.Stat(filepath.Join(sensors, "greedy", "full")); return err == nil })
	var callers sync.WaitGroup
	for i := 1; i <= 20; i++ {
		callers.Add(1)
		go func(i int) {
			defer callers.Done()
			c := newClient(c.url, patience, nil)
			defer c.close()
			for k := 0; k < 5; k++ {
				_, err := c.call(context.Background(), "cmd_submit_reading", 100*k+i, "s")
				if _, err2 := c.call(context.Background(), "cmd_list_sensors"); err != nil || err2 != nil {
					t.Error(err, err2)
				}
			}
		}(i)
	}
	callers.Wait()
	codes := make(map[int]int)
	for i := 0; i < 101; i++ {
		codes[receive(t, "reading", m.readings).code]++
	}
	if codes[codeNotStarted] == 0 || codes[-int(syscall.SIGTERM)] != 1 {
		t.Errorf("got these codes %v; want 126 while no process could be made, and -15 of the greedy one", codes)
	}
	mustCall(t, c, "cmd_submit_reading", 999, "s")
	if got := receive(t, "reading", m.readings); got.code != 0 {
		t.Errorf("afterwards: got %+v", got)
	}
}

const rlimitProcesses = 6 // RLIMIT_NPROC, which package syscall does not have

func TestHelpTexts(t *testing.T) {
	s := testSensors(t, "[ \"$1\" = options ] && echo 'x <vol>  one' && echo 'y      two'")
	writeSensor(t, s.path, "mute", "echo why not >&2; exit 7")
	writeSensor(t, s.path, ".hidden", "echo 1")
	writeSensor(t, s.path, "silent", "true")
	tooLong := strings.Repeat("x", maxName+1)
	writeSensor(t, s.path, tooLong, "echo 1")
	writeTree(t, s.path, map[string]string{"empty/": ""})
	got, err := s.helpTexts(context.Background())
	want := map[string]string{
		"silent": "no help: silent options: nothing said",
		"s":      "x <vol>  one\ny      two",
		"mute":   `no help: mute options: exit 7: "why not"`,
	}
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	if names, unusable, err := s.names(); err != nil || len(names) != 3 || !slices.Equal(unusable, []string{tooLong}) {
		t.Errorf("got %q, unusable %q, %v; want 3 and the one with the long name", names, unusable, err)
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
	names, _, err := newSensors(path, "check", "options", patience, nil).names()
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
	*testing.T
	*queue
	started   chan command
	end       chan reading
	delivered chan string
	discarded chan any
}

func newTestQueue(t *testing.T, concurrency, size int) *testQueue {
	q := &testQueue{
		T: t, started: make(chan command, 100), end: make(chan reading),
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

func (q *testQueue) submit(c command) {
	q.Helper()
	if err := q.accept(context.Background(), c, time.Now().Add(patience)); err != nil {
		q.Errorf("%+v: %v", c, err)
	}
}

// submitLater submits a command for which there is no room.
func (q *testQueue) submitLater(c command) <-chan error {
	q.Helper()
	before, accepted := q.counted().outside, make(chan error, 1)
	go func() { accepted <- q.accept(context.Background(), c, time.Now().Add(patience)) }()
	await(q, "it waits for room", func() bool { return q.counted().outside > before })
	return accepted
}

// counted tells how many commands wait in the queue, and how many for room in it.
func (q *testQueue) counted() (n struct{ waiting, outside int }) {
	q.mu.Lock()
	defer q.mu.Unlock()
	n.waiting, n.outside = len(q.readings.waiting), len(q.outside)
	return n
}

// starts checks which sensors are read next, and ends each run if it is told to.
func (q *testQueue) starts(end bool, sensors ...string) {
	q.Helper()
	for _, want := range sensors {
		if c := receive(q, "start", q.started); c.change+c.sensor != want {
			q.Errorf("%s%s begins; want %s", c.change, c.sensor, want)
		}
		if end {
			q.end <- reading{}
		}
	}
}

// delivers checks what is delivered next.
func (q *testQueue) delivers(readings ...string) {
	q.Helper()
	for _, want := range readings {
		if got := receive(q, "delivery", q.delivered); got != want {
			q.Errorf("delivers %q; want %q", got, want)
		}
	}
}

func TestQueue(t *testing.T) {
	q := newTestQueue(t, 1, 3)
	q.submit(command{ticket: 1, sensor: "a", args: []string{"x"}})
	q.starts(false, "a")
	q.submit(command{ticket: 1, sensor: "a", args: []string{"x"}}) // runs already
	q.submit(command{ticket: 2, sensor: "b"})
	q.submit(command{ticket: 2, sensor: "b"})         // waits already
	q.submit(command{ticket: "2", sensor: "string"})  // another ticket
	q.submit(command{ticket: int64(2), sensor: "i8"}) // and another: now the queue is full
	q.submit(command{ticket: 2, sensor: "c"})         // takes the place of the one that waits
	err := q.accept(context.Background(), command{ticket: 9, sensor: "z"}, time.Now())
	if f := (*fault)(nil); !errors.As(err, &f) || f.code != faultBusy {
		t.Errorf("full: got %v; want a fault %d", err, faultBusy)
	}
	q.end <- reading{}
	q.starts(true, "c", "string", "i8")
	q.delivers("1 0 a", "2 0 c", `"2" 0 string`, "2 0 i8")
}

// TestQueueGivenAway: a running command whose ticket comes again with other
// arguments is not delivered.
func TestQueueGivenAway(t *testing.T) {
	q := newTestQueue(t, 2, 3)
	q.submit(command{ticket: 1, sensor: "old"})
	q.starts(false, "old")
	q.submit(command{ticket: 1, sensor: "new"})
	q.starts(false, "new")
	q.end <- reading{}
	q.end <- reading{}
	q.delivers("1 0 new")
	q.submit(command{ticket: 1, sensor: "new"}) // delivered before: it runs again
	q.end <- reading{}
	q.delivers("1 0 new")
	if len(q.delivered) != 0 || len(q.discarded) != 3 {
		t.Errorf("%d more delivered, %d discarded; want 0, 3", len(q.delivered), len(q.discarded))
	}
}

// TestQueueJoin: a change joins an equal one that waits, but not past another
// change of the sensor. One that runs may have fetched the package before: it is
// made once more, unless the ticket is the same.
func TestQueueJoin(t *testing.T) {
	q := newTestQueue(t, 1, 10)
	change := func(ticket any, change, sensor string) {
		t.Helper()
		q.submit(command{ticket: ticket, change: change, sensor: sensor})
	}
	change(1, "update ", "a")
	q.starts(false, "update a")
	change(1, "update ", "a") // is the one that runs
	change(2, "update ", "a") // once more
	change(3, "update ", "a") // joins 2
	change(3, "update ", "a") // is the same
	change(nil, "update ", "a")
	change(4, "update ", "b")
	change(5, "rollback ", "a")
	change(6, "update ", "a") // not before 5
	change(nil, "update ", "a")
	change(nil, "move", "")
	change(nil, "move", "")
	q.submit(command{ticket: "r", sensor: "a"}) // a reading waits for none of them
	q.starts(false, "a")
	q.end <- reading{}
	q.end <- reading{}
	q.starts(true, "update a", "update b", "rollback a", "update a", "move")
	within(patience, q.close)
	delivered := make(map[string]int)
	for len(q.delivered) > 0 {
		delivered[<-q.delivered]++
	}
	want := map[string]int{"1 0 a": 1, "2 0 a": 1, "3 0 a": 1, "4 0 b": 1, "5 0 a": 1, "6 0 a": 1, `"r" 0 a`: 1}
	if !maps.Equal(delivered, want) || len(q.started) > 0 {
		t.Errorf("got %v and %d more started; want %v", delivered, len(q.started), want)
	}
}

// TestQueueClose: every command that was accepted is delivered at the end, and no
// other one is accepted.
func TestQueueClose(t *testing.T) {
	q := newTestQueue(t, 2, 10)
	for i := 1; i <= 12; i++ {
		q.submit(command{ticket: i, sensor: fmt.Sprint("s", i)})
	}
	receive(t, "start", q.started)
	receive(t, "start", q.started)
	refused := q.submitLater(command{ticket: 13, sensor: "s13"})
	within(0, q.close)
	if err := receive(t, "a fault", refused); err == nil || !strings.Contains(err.Error(), "shutting down") {
		t.Errorf("got %v", err)
	}
	if n := len(q.delivered); n != 12 {
		t.Errorf("%d delivered; want every one of 12", n)
	}
	for len(q.delivered) > 0 {
		if got := <-q.delivered; !strings.Contains(got, " -15 ") {
			t.Errorf("got %q", got)
		}
	}
}

// TestQueueTurns: who floods the queue does not keep another out, who finds
// room although it is full and whose commands are run in turn.
func TestQueueTurns(t *testing.T) {
	q := newTestQueue(t, 1, 8)
	flood := command{sensor: "flood", from: "flood"}
	var flooded []<-chan error
	for i := 0; i < 19; i++ { // one runs, eight wait
		flood.ticket = i
		if i < 9 {
			q.submit(flood)
		} else {
			flooded = append(flooded, q.submitLater(flood))
		}
	}
	q.submit(command{ticket: 20, sensor: "monitor", from: "monitor"}) // at once
	q.submit(command{ticket: 21, sensor: "monitor", from: "monitor"})
	q.starts(true, "flood", "flood", "monitor", "flood", "monitor")
	for i := 0; i < 16; i++ {
		q.starts(true, "flood")
	}
	for i, accepted := range flooded {
		if err := receive(t, "room", accepted); err != nil {
			t.Errorf("%d: %v", i, err)
		}
	}
}

// TestQueueOrder: who waits for room gets it in the order of coming.
func TestQueueOrder(t *testing.T) {
	q := newTestQueue(t, 1, 1)
	q.submit(command{ticket: 0, sensor: "a"})
	q.submit(command{ticket: 1, sensor: "b"})
	var accepted []<-chan error
	for i, sensor := range []string{"c", "d", "e", "f"} {
		accepted = append(accepted, q.submitLater(command{ticket: 2 + i, sensor: sensor}))
	}
	q.starts(true, "a", "b", "c", "d", "e", "f")
	for _, accepted := range accepted {
		if err := receive(t, "room", accepted); err != nil {
			t.Error(err)
		}
	}
}

// TestQueueCap: one sensor leaves a slot to the others, if there are several.
func TestQueueCap(t *testing.T) {
	q := newTestQueue(t, 3, 5)
	for i := 0; i < 5; i++ {
		q.submit(command{ticket: i, sensor: "hangs"})
	}
	q.starts(false, "hangs", "hangs")
	for i := 5; i < 8; i++ {
		q.submit(command{ticket: i, sensor: fmt.Sprint("s", i)})
	}
	q.starts(false, "s5")
	q.end <- reading{} // whichever of the three it is
	receive(t, "another", q.started)
	if n := q.counted().waiting; n != 4 || len(q.started) > 0 {
		t.Errorf("%d wait, %d more started; want 4, 0", n, len(q.started))
	}
	q.resize(1, 5) // where there is one slot only, every sensor may have it
	for i := 0; i < 7; i++ {
		q.end <- reading{}
	}
	within(patience, q.close)
	if len(q.delivered) != 8 {
		t.Errorf("%d delivered; want 8", len(q.delivered))
	}
}

// TestQueueResize: another concurrency and size are in force at once.
func TestQueueResize(t *testing.T) {
	q := newTestQueue(t, 1, 1)
	q.submit(command{ticket: 1, sensor: "a"})
	q.submit(command{ticket: 2, sensor: "b"})
	q.starts(false, "a")
	waited := q.submitLater(command{ticket: 3, sensor: "c"})
	q.resize(3, 1)
	if err := receive(t, "room", waited); err != nil {
		t.Error(err)
	}
	for i := 0; i < 2; i++ {
		receive(t, "start", q.started)
	}
	q.resize(1, 1)
	q.submit(command{ticket: 4, sensor: "d"})
	for i := 0; i < 3; i++ {
		if len(q.started) > 0 {
			t.Error("more than one runs")
		}
		q.end <- reading{}
	}
	q.starts(true, "d")
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
		if err := q.accept(context.Background(), command{ticket: i, sensor: fmt.Sprint(i)}, time.Now().Add(patience)); err != nil {
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

func TestResponse(t *testing.T) {
	value := map[string]any{
		"b": []any{nil, true, false, 1, int64(2), 2.5, 1e20}, "a<&>\"'": "\x00\r\n\t\xff ü]]>",
		"d": dateTime("20261122T20:43:21"), "e": []byte("hello"),
	}
	message := encodeResponse(value, nil)
	golden(t, "testdata/response.golden", string(message)+"\n")
	value["a<&>\"'"] = "\uFFFD\r\n\t\uFFFD ü]]>"
	if got, err := decodeResponse(message); err != nil || !reflect.DeepEqual(got, value) {
		t.Errorf("got %#v, %v; want %#v", got, err, value)
	}
	_, err := decodeResponse(encodeResponse(nil, faultf(7, "no\nway")))
	if f := (*fault)(nil); !errors.As(err, &f) || *f != (fault{7, "no way"}) {
		t.Errorf("got %v", err)
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
		if err != nil || method2 != method || !reflect.DeepEqual(params2, params) {
			t.Fatalf("%q %#v reads back as %q %#v, %v", method, params, method2, params2, err)
		}
	})
}

// FuzzResponse: a result that can be read is the same when it is written and
// read again; so is a fault.
func FuzzResponse(f *testing.F) {
	xmlSeeds(f)
	every := []any{1, int64(2), "a", nil, true, []byte("b"), dateTime("20261122T20:43:21"), map[string]any{"x": 2.5}}
	f.Add(encodeResponse(every, nil))
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

// notation is what stands in braces in testdata: a byte or several, {\x00}, and
// what is repeated, {x*65536}.
var notation = regexp.MustCompile(`\{(\\[^{}*]*)\}|\{([^{}]*)\*(\d+)\}`)

// expand returns a text of testdata without its notation.
func expand(t *testing.T, text string) string {
	call := string(encodeCall("healthcheck"))
	text = strings.NewReplacer("{call}", call, "{message}", message("<param><value/></param>")).Replace(text)
	return notation.ReplaceAllStringFunc(text, func(braces string) string {
		part := notation.FindStringSubmatch(braces)
		plain, err := strconv.Unquote(`"` + strings.ReplaceAll(part[1]+part[2], `"`, `\"`) + `"`)
		if err != nil {
			t.Fatalf("%s: %v", braces, err)
		}
		n := 1
		if part[3] != "" {
			n, _ = strconv.Atoi(part[3])
		}
		return strings.Repeat(plain, n)
	})
}

// message returns a call of the method m, which there is not, with what is in its
// <params>.
func message(params string) string {
	return "<methodCall><methodName>m</methodName><params>" + params + "</params></methodCall>"
}

// httpText returns a text of testdata as HTTP, with its lines' ends.
func httpText(text string) string {
	if !strings.HasSuffix(text, "\n\n") {
		text = strings.TrimSuffix(text, "\n")
	}
	return strings.ReplaceAll(text, "\n", "\r\n")
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
	post := func(head, method string) string {
		body := encodeCall(method)
		return fmt.Sprintf("POST %s\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", head, len(body), body)
	}
	call := string(encodeCall("healthcheck"))
	chunked := "POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" +
		"3\r\n" + call[:3] + "\r\n60\r\n" + call[3:] + "\r\n0\r\n\r\n"
	tests := []struct{ request, want string }{
		{post("/xmlrpc HTTP/1.1", "healthcheck"), "HTTP/1.1 200 .*text/xml.*<string>OK<"},
		{post("/xmlrpc/ HTTP/1.1", "healthcheck"), "HTTP/1.1 200 .*<string>OK<"},
		{post("/RPC2 HTTP/1.1", "healthcheck"), "HTTP/1.1 200 .*<string>OK<"},
		{post("/ HTTP/1.1", "healthcheck"), "HTTP/1.1 200 .*<string>OK<"},
		{post("/ HTTP/1.1\r\nContent-Type: application/x-www-form-urlencoded", "healthcheck"), "HTTP/1.1 200 .*<string>OK<"},
		{post("/ HTTP/1.1\r\nExpect: 100-continue", "healthcheck"), "HTTP/1.1 100 .*HTTP/1.1 200 .*<string>OK<"},
		{post("/ HTTP/1.1\r\nContent-Encoding: identity", "healthcheck"), "HTTP/1.1 200 "},
		{"POST / HTTP/1.0\r\nContent-Length: 99\r\n\r\n" + call, "HTTP/1.0 200 .*Content-Length: 120.*<string>OK<"},
		{chunked, "HTTP/1.1 200 .*<string>OK<"},
		{"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "HTTP/1.1 405 .*Allow: POST\r\n"},
		{"GET / HTTP/1.0\r\n\r\n", "HTTP/1.0 405 .*Allow: POST\r\n"},
		{post("/ HTTP/1.1", "defect"), "HTTP/1.1 200 .*<int>-32603<"},
		{post("/ HTTP/1.1", "error"), "HTTP/1.1 200 .*<int>-32603<"},
	}
	for _, test := range tests {
		conn, err := net.Dial("tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, test.request)
		conn.SetReadDeadline(time.Now().Add(patience))
		answer, err := io.ReadAll(conn)
		conn.Close()
		if err != nil || !regexp.MustCompile("(?s)^"+test.want).Match(answer) {
			t.Errorf("%.100q: got %q, %v; want %q", test.request, answer, err, test.want)
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

// TestHalfClosed: a caller that has closed its sending side, as nc -N does, gets the
// answer all the same.
func TestHalfClosed(t *testing.T) {
	s := testSettings(t, t.TempDir(), newRecorder(t).url)
	writeSensor(t, s.path, "s", "sleep 0.2; echo what it is")
	a, _ := startAgent(t, s)
	got := exchange(t, a.listener.Addr().String(), postedCall("cmd_list_sensors"))
	if want := "s:what it is"; !strings.Contains(got, want) {
		t.Errorf("got %s; want %s", got, want)
	}
}

// requestKinds has, by the kind of a case in testdata/requests.txt, the texts that
// each of its lines is put into, and what makes a request of such a text.
var requestKinds = map[string]struct {
	request func(text string) string
	texts   []string
}{
	"request":   {strings.Clone, []string{"%s"}},
	"line":      {strings.Clone, []string{"%s\r\nHost: x\r\nContent-Length: 99\r\n\r\n{call}"}},
	"header":    {strings.Clone, []string{"POST / HTTP/1.1\r\nHost: x\r\n%s\r\nContent-Length: 99\r\n\r\n{call}"}},
	"length":    {strings.Clone, []string{"POST / HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n{call}"}},
	"chunks":    {strings.Clone, []string{"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%s"}},
	"body":      {posted, []string{"%s"}},
	"param":     {posted, []string{message("<param>%s</param>")}},
	"value":     {postedCall, []string{"m | %s"}},
	"call":      {postedCall, []string{"%s"}},
	"arguments": {postedCall, []string{"cmd_submit_reading | <int>7</int> | s | %s"}},
	"multicall": {postedCall, []string{"system.multicall | <array><data><value>%s</value></data></array>"}},
	"sensor": {postedCall, []string{
		"cmd_submit_reading | <int>7</int> | %s", "cmd_update_sensor_code | %s",
		"cmd_rollback_sensor_code | %s | <int>7</int>",
	}},
	"ticket": {postedCall, []string{
		"cmd_submit_reading | %s | s", "cmd_update_sensor_code | s | %s",
		"cmd_rollback_sensor_code | s | %s", "cmd_register_new_server | %s",
	}},
}

// posted returns the request with a body.
func posted(body string) string {
	return fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// postedCall returns the request of a method with the values of its parameters,
// split by " | ".
func postedCall(call string) string {
	method, values, some := strings.Cut(call, " | ")
	params := ""
	if some {
		params = "<param><value>" + strings.ReplaceAll(values, " | ", "</value></param><param><value>") + "</value></param>"
	}
	return posted("<methodCall><methodName>" + method + "</methodName><params>" + params + "</params></methodCall>")
}

type badRequest struct{ want, request string }

// badRequests returns the requests of testdata/requests.txt.
func badRequests(t *testing.T) (list []badRequest) {
	for _, c := range cases(t, "testdata/requests.txt") {
		space := strings.LastIndex(c.name, " ")
		want, kind := c.name[:space], requestKinds[c.name[space+1:]]
		lines := strings.Split(strings.TrimSuffix(c.text, "\n"), "\n")
		if c.name[space+1:] == "request" {
			lines = []string{httpText(c.text)}
		}
		for _, line := range lines {
			for _, text := range kind.texts {
				list = append(list, badRequest{want, kind.request(expand(t, strings.Replace(text, "%s", line, 1)))})
			}
		}
	}
	return list
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

	tests := badRequests(t)
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

// TestConnToClose: whoever comes when all connections are taken gets one, unless
// he holds the most. A call that waits does not give way to an idle connection.
func TestConnToClose(t *testing.T) {
	var apart []string // hosts, none of which holds more than another
	for i := 1; i <= maxConns; i++ {
		apart = append(apart, fmt.Sprint("10.0.1.", i))
	}
	for _, test := range []struct {
		name    string
		hosts   []string // of 64 connections, in turn
		working int      // so many of them are
		comes   string
		gives   string // whose connection gives way
	}{
		{"a hog with one address", []string{"10.0.0.2"}, maxConns, "10.0.0.9", `10\.0\.0\.2`},
		{"a hog with four", []string{"10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"}, maxConns, "10.0.0.9", `10\.0\.0\.[2-5]`},
		{"a neighbour", []string{"2001:db8::bad"}, maxConns, "2001:db8::1", `2001:db8::bad`},
		{"idle ones", []string{"10.0.0.2", "10.0.0.3"}, 0, "10.0.0.9", `10\.0\.0\.[23]`},
		{"himself", []string{"10.0.0.9"}, maxConns, "10.0.0.9", `10\.0\.0\.9`},
		{"one that may not call", append([]string{"192.168.0.1"}, apart[1:]...), maxConns, "10.0.0.9", `192\.168\.0\.1`},
		{"the idle one", apart, maxConns - 1, "10.0.0.9", `10\.0\.1\.64`},
		{"the longest idle one", apart, 0, "10.0.0.9", `10\.0\.1\.1`},
		{"the latest call", apart, maxConns, "10.0.0.9", `10\.0\.1\.64`},
	} {
		h := newHandler(nil)
		h.setAccess(&access{allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}})
		admit := func(host string) *peerConn {
			c, other := net.Pipe()
			t.Cleanup(func() { c.Close(); other.Close() })
			return peerOf(h.admit(addressed{c, &net.TCPAddr{IP: net.ParseIP(host), Port: 1}}))
		}
		for i := 0; i < maxConns; i++ {
			p := admit(test.hosts[i%len(test.hosts)])
			p.working, p.since = i < test.working, time.Unix(int64(i), 0)
		}
		before := maps.Clone(h.conns)
		before[admit(test.comes)] = true
		var gave []string
		for p := range before {
			if !h.conns[p] {
				gave = append(gave, p.host)
				if p.ctx.Err() == nil {
					t.Errorf("%s: the call on it goes on", test.name)
				}
			}
		}
		if len(gave) != 1 || !regexp.MustCompile("^"+test.gives+"$").MatchString(gave[0]) || h.count.Load() != 1 {
			t.Errorf("%s: %v gave way, %d counted; want %s", test.name, gave, h.count.Load(), test.gives)
		}
	}
}

// An addressed connection comes from that address.
type addressed struct {
	net.Conn
	remote net.Addr
}

func (a addressed) RemoteAddr() net.Addr { return a.remote }

// TestLargeAnswers: an answer has 64 KiB at most, whatever the calls are that it
// is for; only a package may have more.
func TestLargeAnswers(t *testing.T) {
	lines := logged(t)
	u := serve(t, newHandler([]method{
		{"quarter", "string", "", func(request, []any) (any, error) { return strings.Repeat("&", maxMessage/20), nil }},
		{"whole", "string", "", func(request, []any) (any, error) { return strings.Repeat("x", maxMessage-118), nil }},
		{"more", "string", "", func(request, []any) (any, error) { return strings.Repeat("x", maxMessage-117), nil }},
		{"package", "base64", "", func(request, []any) (any, error) { return make([]byte, maxMessage), nil }},
	}))
	c := newClient(u, patience, nil)
	defer c.close()
	call := map[string]any{"methodName": "quarter", "params": []any{}}
	calls := []any{call, call, call, call}
	for _, test := range []struct {
		name   string
		params []any
		fault  int
	}{
		{"whole", nil, 0},
		{"more", nil, faultRequest},
		{"package", nil, 0},
		{"system.multicall", []any{calls[:3]}, 0},
		{"system.multicall", []any{calls}, faultRequest},
	} {
		_, err := c.call(context.Background(), test.name, test.params...)
		f := &fault{}
		if errors.As(err, &f); f.code != test.fault || err != nil && test.fault == 0 {
			t.Errorf("%s: got %v; want fault %d", test.name, err, test.fault)
		}
	}
	if want := `127.0.0.1: "more": fault -32600: the answer has more than 65536 bytes`; !strings.Contains(lines.String(), want) {
		t.Errorf("got %s; want %s", lines, want)
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

// TestClientKeepsConnection: a burst goes over one connection, over TLS, too. It does
// not stay open for long: it might be the only one that the monitor can serve.
func TestClientKeepsConnection(t *testing.T) {
	files := newCA(t, "ca").files(t, "monitor", time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	for scheme, rules := range map[string]*tls.Config{"http": nil, "https": serverTLS(files)} {
		h := newHandler([]method{{"healthcheck", "string", "OK.", healthcheck}})
		h.setAccess(&access{tls: rules})
		u := serve(t, h)
		u.Scheme = scheme
		c := newClient(u, patience, clientTLS(files))
		idle := &c.http.Transport.(*http.Transport).IdleConnTimeout
		usual := *idle
		*idle = patience
		conns := make(map[*peerConn]bool)
		for i := 0; i < 20; i++ {
			mustCall(t, c, "healthcheck")
			h.mu.Lock()
			maps.Copy(conns, h.conns)
			h.mu.Unlock()
		}
		if len(conns) != 1 {
			t.Errorf("%s: got %d connections; want 1", scheme, len(conns))
		}
		c.close()
		*idle = usual
		mustCall(t, c, "healthcheck")
		await(t, "the connection is closed", func() bool { h.mu.Lock(); defer h.mu.Unlock(); return len(h.conns) == 0 })
	}
}

// answers are the cases of a kind in testdata/answers.txt, without the kind.
func answers(t *testing.T, kind string) (list []testCase) {
	for _, c := range cases(t, "testdata/answers.txt") {
		if name, ok := strings.CutSuffix(c.name, " "+kind); ok {
			list = append(list, testCase{name, c.text})
		}
	}
	return list
}

// TestAnswers: what is a methodResponse, and what is none.
func TestAnswers(t *testing.T) {
	for _, c := range answers(t, "message") {
		for _, line := range strings.Split(strings.TrimSuffix(c.text, "\n"), "\n") {
			v, err := decodeResponse([]byte(expand(t, line)))
			got := fmt.Sprintf("%#v", v)
			if f := (*fault)(nil); errors.As(err, &f) {
				got = err.Error()
			} else if err != nil {
				got = "none"
			}
			if got != c.name {
				t.Errorf("%s: got %s, %v; want %s", line, got, err, c.name)
			}
		}
	}
}

// TestClient: what a monitor may answer, byte for byte, and what becomes of the
// connection. Nothing goes anywhere else.
func TestClient(t *testing.T) {
	elsewhere := newRecorder(t)
	t.Setenv("HTTP_PROXY", elsewhere.url.String())
	t.Setenv("http_proxy", elsewhere.url.String())
	response := func(v any, err error) string { return string(encodeResponse(v, err)) }
	bodies := strings.NewReplacer("{a}", response("a", nil), "{b}", response("b", nil),
		"{fault}", response(nil, faultf(7, "x")), "{elsewhere}", elsewhere.url.String())
	name := regexp.MustCompile(`^(.*) over (\d): (.*)$`)
	for _, c := range cases(t, "testdata/answers.txt") {
		parts := name.FindStringSubmatch(c.name)
		if parts == nil { // of another kind
			continue
		}
		t.Run(parts[3], func(t *testing.T) {
			l := listenRaw(t, func(conn net.Conn) {
				r := bufio.NewReader(conn)
				for _, answer := range strings.Split(c.text, "...\n") {
					if answer == "close\n" {
						return
					}
					request, err := http.ReadRequest(r)
					if err != nil || answer == "" {
						return
					}
					if user, password, _ := request.BasicAuth(); user != "user" || password != "secret" ||
						request.ContentLength <= 0 || request.Header.Get("Content-Type") != "text/xml" || len(request.Header) != 4 {
						t.Errorf("got %v", request)
					}
					io.Copy(io.Discard, request.Body)
					io.WriteString(conn, bodies.Replace(expand(t, httpText(answer))))
				}
				io.Copy(io.Discard, r) // until the client hangs up
			})
			defer l.close()
			u := &url.URL{Scheme: "http", User: url.UserPassword("user", "secret"), Host: l.Addr().String()}
			client := newClient(u, patience, nil)
			client.http.Transport.(*http.Transport).IdleConnTimeout = patience
			defer client.close()
			if parts[3] == "half a header" {
				client.timeout = time.Second / 2
			}
			for _, want := range strings.Split(parts[1], " then ") {
				v, err := client.call(context.Background(), "m")
				got := fmt.Sprint(v)
				if err != nil {
					got = err.Error()
				}
				if !regexp.MustCompile("^"+want+"$").MatchString(got) || strings.Contains(got, "secret") {
					t.Errorf("got %s; want %s", got, want)
				}
			}
			if got := fmt.Sprint(l.conns.Load()); got != parts[2] {
				t.Errorf("%s connections; want %s", got, parts[2])
			}
		})
	}
	if n := elsewhere.tries.Load(); n != 0 {
		t.Errorf("%d requests elsewhere", n)
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

// TestClientCancelled: what was cancelled before is not sent; what was cancelled
// when all had come is there.
func TestClientCancelled(t *testing.T) {
	m := newRecorder(t)
	c := newClient(m.url, patience, nil)
	c.http.Transport.(*http.Transport).IdleConnTimeout = patience
	defer c.close()
	mustCall(t, c, "healthcheck")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for i := 0; i < 20; i++ {
		_, err := c.call(ctx, "cmd_store_probe_data", i, []any{0, "1"}, dateTime("20261122T20:43:21"))
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v; want %v", err, context.Canceled)
		}
	}
	ctx, cancel = context.WithCancel(context.Background())
	err := c.post(ctx, "healthcheck", nil, func(body io.Reader) error {
		_, err := io.ReadAll(body)
		cancel()
		return err
	})
	if err != nil {
		t.Error(err)
	}
	ctx, cancel = context.WithCancel(context.Background())
	hold := make(chan struct{})
	defer close(hold)
	m.set(func(http.ResponseWriter, int) bool { cancel(); <-hold; return true })
	if _, err := c.call(ctx, "healthcheck"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled while it waits: got %v; want %v", err, context.Canceled)
	}
	m.set(nil)
	mustCall(t, c, "healthcheck")
	if n := len(m.readings); n != 0 {
		t.Errorf("%d sent", n)
	}
}

// TestClientURL: where a call goes to, by the URL.
func TestClientURL(t *testing.T) {
	got := ""
	u := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got += " " + r.Host + " " + r.RequestURI
		w.Write(encodeResponse("OK", nil))
	}))
	for text, want := range map[string]string{
		"http://monitor":                       "monitor:80 monitor /",
		"http://monitor:/a%20b?c=d#e":          "monitor:80 monitor /a%20b?c=d",
		"http://[fe80::1%25eth0]:8081/xmlrpc/": "[fe80::1%eth0]:8081 [fe80::1]:8081 /xmlrpc/",
	} {
		parsed, err := httpURL(text)
		if err != nil {
			t.Fatal(err)
		}
		c := newClient(parsed, patience, nil)
		c.http.Transport.(*http.Transport).DialContext = func(_ context.Context, network, address string) (net.Conn, error) {
			got = address
			return net.Dial(network, u.Host)
		}
		mustCall(t, c, "healthcheck")
		c.close()
		if got != want {
			t.Errorf("%s: got %s; want %s", text, got, want)
		}
	}
}

// deadAddress returns a port at which nobody answers a SYN to 127.0.0.2, until the
// function that it returns is called: a socket with a queue that is full.
func deadAddress(t *testing.T) (port int, end func()) {
	t.Helper()
	address := &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 2}}
	var sockets []int
	for i := 0; i < 5; i++ {
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		sockets = append(sockets, fd)
		if i > 0 {
			syscall.Connect(fd, address) // goes on in the background, if at all
			continue
		}
		err = errors.Join(syscall.Bind(fd, address), syscall.Listen(fd, 0))
		name, _ := syscall.Getsockname(fd)
		if err != nil || name == nil {
			t.Fatal(err)
		}
		address.Port = name.(*syscall.SockaddrInet4).Port
	}
	end = func() {
		for _, fd := range sockets {
			syscall.Close(fd)
		}
		sockets = nil
	}
	t.Cleanup(end)
	return address.Port, end
}

// TestClientAddresses: of a name with several addresses the one that answered last
// is tried first, and one that is dead leaves time for the others.
func TestClientAddresses(t *testing.T) {
	port, endDead := deadAddress(t)
	c := newClient(&url.URL{Scheme: "http", Host: fmt.Sprint("monitor:", port)}, 2*time.Second, nil)
	c.lookup = func(context.Context, string, string) ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.3")}, nil
	}
	var silent atomic.Bool // whether 127.0.0.2 leaves its callers waiting
	listen := func(host string) *http.Server {
		l, err := net.Listen("tcp", fmt.Sprint(host, ":", port))
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			if silent.Load() && host == "127.0.0.2" {
				<-r.Context().Done()
			}
			w.Write(encodeResponse(host, nil))
		})}
		go s.Serve(l)
		t.Cleanup(func() { s.Close() })
		return s
	}
	want := func(what, host string) {
		t.Helper()
		v, err := c.call(context.Background(), "m")
		c.close()
		if v != any(host) && (host != "" || err == nil) {
			t.Errorf("%s: got %v, %v; want an answer of %q", what, v, err, host)
		}
	}
	second := listen("127.0.0.3")
	want("the first is dead", "127.0.0.3")
	endDead()
	first := listen("127.0.0.2")
	want("the second answered last", "127.0.0.3")
	second.Close()
	want("the second is gone", "127.0.0.2")
	second = listen("127.0.0.3")
	want("the first answered last", "127.0.0.2")
	silent.Store(true)
	want("the first is silent", "")
	want("the first was silent", "127.0.0.3")
	silent.Store(false)
	first.Close()
	second.Close()
	want("both are gone", "")
	listen("127.0.0.2")
	listen("127.0.0.3")
	want("the second answered last, before", "127.0.0.3")
}

// TestManyCallers: whatever 60 callers send or leave unread, an agent in 16 MiB
// goes on, from its first moment, and answers others within ten seconds.
func TestManyCallers(t *testing.T) {
	dir := t.TempDir()
	build := exec.Command("go", "build", "-tags", "nethttpomithttp2", "-o", filepath.Join(dir, "picket"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	writeTree(t, dir, map[string]string{
		"sensors/s/check": "#!/bin/sh\nexec sleep 100\n",
		"client.cfg": "[sensor]\ntimeout = 100\nconcurrency = 1\n[monitor]\nurl = http://127.0.0.1:9/\n" +
			"[agent]\nqueue = 4\nlisten = 127.0.0.1:0\n",
	})
	// multicall returns the request of a system.multicall: each call is a method
	// and what is in the array of its parameters.
	multicall := func(calls ...string) string {
		text := ""
		for _, call := range calls {
			name, params, _ := strings.Cut(call, " ")
			text += "<value><struct><member><name>methodName</name><value>" + name + "</value></member>" +
				"<member><name>params</name><value><array><data>" + params + "</data></array></value></member></struct></value>"
		}
		return postedCall("system.multicall | <array><data>" + text + "</data></array>")
	}
	const submit = "cmd_submit_reading <value><int>%d</int></value><value>s</value>"
	capabilities := make([]string, 45)
	for i := range capabilities {
		capabilities[i] = "system.getCapabilities"
	}
	for _, test := range []struct {
		name    string
		times   int // that each caller sends his request
		reads   int // answers that he reads
		request func(caller int) string
	}{
		{"slow senders", 1, 0, func(int) string {
			return "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 65536\r\n\r\n" + strings.Repeat(" ", 65535)
		}},
		{"unread answers", 5, 0, func(int) string { return multicall(capabilities...) }},
		{"many attributes", 4, 4, func(int) string {
			return posted("<methodCall " + strings.Repeat("a='' ", 13000) + "><methodName>m</methodName></methodCall>")
		}},
		{"many values", 4, 4, func(int) string {
			return postedCall("m | <array><data>" + strings.Repeat("<value>ab</value>", 1900) + "</data></array>")
		}},
		{"calls that wait", 1, 0, func(caller int) string {
			values := "m " + strings.Repeat("<value>ab</value>", 1500)
			return multicall(append(capabilities[:25:25], fmt.Sprintf(submit, caller), values)...)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			address, lines := startLimited(t, dir, 16<<20)
			var callers sync.WaitGroup
			for i := 1; i <= 60; i++ {
				from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(i))}}
				conn, err := from.Dial("tcp", address)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				conn.(*net.TCPConn).SetReadBuffer(4 << 10)
				requests := strings.Repeat(test.request(i), test.times)
				callers.Add(1)
				go func() {
					defer callers.Done()
					r := bufio.NewReader(conn)
					io.WriteString(conn, requests)
					if test.times > 1 {
						r.Peek(1) // the first answer is there
					}
					for k := 0; k < test.reads; k++ {
						resp, err := http.ReadResponse(r, nil)
						if err != nil {
							t.Error(err)
							return
						}
						io.Copy(io.Discard, resp.Body)
					}
				}()
			}
			healthy := func() {
				c := newClient(&url.URL{Scheme: "http", Host: address}, 10*time.Second, nil)
				defer c.close()
				if v, err := c.call(context.Background(), "healthcheck"); v != "OK" {
					t.Errorf("got %v, %v", v, err)
				}
			}
			for i := 0; i < 20; i++ {
				healthy()
			}
			callers.Wait()
			if test.name == "calls that wait" {
				await(t, "all wait", func() bool { return strings.Count(lines.String(), "command cmd_submit_reading") == 60 })
			}
			healthy()
		})
	}
}

// startLimited starts the program of a directory in a memory cgroup, or skips the
// test. It returns as soon as the program listens.
func startLimited(t *testing.T, dir string, limit int64) (address string, log *lockedBuffer) {
	t.Helper()
	group, ok := memoryGroup(t, limit)
	if !ok {
		t.Skip("no memory cgroup on this machine, or no right to make one")
	}
	cmd := exec.Command("sh", "-c", `echo $$ >"$1/cgroup.procs"; exec ./picket`, "sh", group)
	cmd.Dir = dir
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		pids, _ := os.ReadFile(filepath.Join(group, "cgroup.procs")) // its sensors, too
		for _, pid := range strings.Fields(string(pids)) {
			n, _ := strconv.Atoi(pid)
			syscall.Kill(n, syscall.SIGKILL)
		}
		if cmd.Wait(); cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || len(pids) == 0 {
			t.Errorf("the agent ended before: %v", cmd.ProcessState)
		}
		peak, _ := os.ReadFile(filepath.Join(group, "memory.max_usage_in_bytes")) // where there is one
		t.Logf("peak of the group: %s", peak)
	})
	lines := bufio.NewReader(stderr)
	line, err := lines.ReadString('\n')
	_, rest, ok := strings.Cut(line, " on 127.0.0.1:")
	if err != nil || !ok {
		t.Fatalf("got %q, %v", line, err)
	}
	log = &lockedBuffer{}
	go io.Copy(log, lines)
	port, _, _ := strings.Cut(rest, ",")
	return "127.0.0.1:" + port, log
}

// testDelivery delivers to a recorder with waits of milliseconds.
func testDelivery(t *testing.T, m *recorder) *delivery { return spoolDelivery(t, m, nil) }

// spoolDelivery is a testDelivery with a spool.
func spoolDelivery(t *testing.T, m *recorder, s *spool) *delivery {
	d := newDelivery(newClient(m.url, patience, nil), time.UTC, "nan", time.Millisecond, s)
	t.Cleanup(func() { within(patience, d.close) })
	return d
}

// locked calls f while the delivery is locked, and returns what it returns.
func locked[T any](d *delivery, f func() T) T {
	d.mu.Lock()
	defer d.mu.Unlock()
	return f()
}

func isAway(d *delivery) bool { return locked(d, func() bool { return !d.awaySince.IsZero() }) }

// puts puts readings with the tickets from first to last.
func puts(d *delivery, first, last int) {
	for i := first; i <= last; i++ {
		d.put(i, reading{value: strconv.Itoa(i), taken: time.Now()})
	}
}

// gets receives the readings with the tickets from first to last, in any order.
func gets(t *testing.T, m *recorder, first, last int) {
	t.Helper()
	seen := make(map[any]bool)
	for i := first; i <= last; i++ {
		ticket := receive(t, "reading", m.readings).ticket
		if n, ok := ticket.(int); !ok || n < first || n > last || seen[ticket] {
			t.Fatalf("got ticket %v, seen before: %v; want each from %d to %d once", ticket, seen[ticket], first, last)
		}
		seen[ticket] = true
	}
}

// hold makes each attempt wait until it is told how to answer: with an HTTP
// status, or with 0 as a monitor does. Attempts come on the first channel.
func hold(m *recorder) (attempts chan int, answer chan int) {
	attempts, answer = make(chan int, 10000), make(chan int)
	m.set(func(w http.ResponseWriter, try int) bool {
		attempts <- try
		status := <-answer
		if status != 0 {
			w.WriteHeader(status)
		}
		return status != 0
	})
	return attempts, answer
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
	if want := (storedReading{"", "127.0.0.1", 7, 0, "0.420"}); got != want {
		t.Errorf("got %+v; want %+v", got, want)
	}
	d.configure(newClient(m.url, patience, nil), time.UTC, "0")
	for _, ticket := range []any{"t", int64(8)} {
		d.put(ticket, reading{code: 3, taken: time.Now()})
		if got := receive(t, "reading", m.readings); got.ticket != ticket || got.code != 3 || got.value != "0" {
			t.Errorf("got %+v; want ticket %v, code 3, value 0", got, ticket)
		}
	}
}

// TestDeliveryClock: the time that is sent is when the reading was taken, also
// where the clock was set since. A suspend does not set it.
func TestDeliveryClock(t *testing.T) {
	wall := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	taken := clocks{wall, time.Hour, "boot"}
	for _, test := range []struct {
		name      string
		now       clocks
		corrected time.Duration
	}{
		{"an hour passed", clocks{wall.Add(time.Hour), 2 * time.Hour, "boot"}, 0},
		{"suspended for an hour, of which the monotonic clock knows nothing", clocks{wall.Add(time.Hour + 1), 2*time.Hour + 1, "boot"}, 0},
		{"the clock was set", clocks{wall.Add(25 * time.Hour), 2 * time.Hour, "boot"}, 24 * time.Hour},
		{"and set back", clocks{wall.Add(-23 * time.Hour), 2 * time.Hour, "boot"}, -24 * time.Hour},
		{"a clock that runs slow was corrected", clocks{wall.Add(time.Hour + time.Second), 2 * time.Hour, "boot"}, 0},
	} {
		test, m := test, newRecorder(t)
		d := testDelivery(t, m)
		var now atomic.Pointer[clocks]
		now.Store(&taken)
		locked(d, func() any { d.clocks = func() clocks { return *now.Load() }; return nil })
		attempts, answer := hold(m)
		d.put(1, reading{taken: time.Now()})
		receive(t, "an attempt", attempts)
		now.Store(&test.now)
		answer <- 503
		receive(t, "another", attempts)
		answer <- 0
		got := receive(t, "reading", m.readings)
		at, err := time.Parse(dateTimeLayout, string(got.time))
		if off := at.Sub(wall.Add(test.corrected)).Abs(); err != nil || off > 2*time.Second {
			t.Errorf("%s: got %s, %v; want %s", test.name, got.time, err, wall.Add(test.corrected))
		}
	}
}

// TestClocks compares with what the kernel says in /proc.
func TestClocks(t *testing.T) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	text, err2 := os.ReadFile("/proc/uptime")
	if err != nil || err2 != nil {
		t.Skip(err, err2)
	}
	now := systemClocks()()
	up, err := strconv.ParseFloat(strings.Fields(string(text))[0], 64)
	if off := now.age.Seconds() - up; err != nil || off < -1 || off > patience.Seconds() || !strings.HasPrefix(string(id), now.boot) || len(now.boot) != 8 {
		t.Errorf("got %+v; want boot %s and an age of %fs", now, id, up)
	}
}

// TestDeliveryAway: whatever a monitor does that is no answer, a reading is
// kept and tried again. The log says when the monitor goes and when it is back.
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
	puts(d, 1, 10)
	close(kept)
	gets(t, m, 1, 10)
	want := `^monitor http://127.0.0.1:[0-9]+/xmlrpc/: away: HTTP "503 Service Unavailable"\nmonitor .*: back after [0-9]+s, 9 to deliver\n$`
	if !regexp.MustCompile(want).MatchString(lines.String()) {
		t.Errorf("got %s; want %s", lines, want)
	}
}

// TestDeliveryTurns: readings come from the oldest and the newest end in turn,
// so that behind an outage fresh ones do not wait for the end of the backlog.
func TestDeliveryTurns(t *testing.T) {
	m := newRecorder(t)
	attempts, answer := hold(m)
	d := testDelivery(t, m)
	puts(d, 1, 1)
	receive(t, "an attempt", attempts)
	puts(d, 2, 7)
	answer <- 503
	for range [3]int{} { // the monitor is back
		receive(t, "another", attempts)
		answer <- 0
	}
	receive(t, "another", attempts)
	puts(d, 1001, 1002)
	m.set(nil)
	answer <- 0
	for _, want := range []int{7, 2, 6, 3, 1002, 4, 1001, 5, 1} { // the one that was tried comes last
		gets(t, m, want, want)
	}
}

// TestDeliveryPoison: a reading on which the monitor always fails or hangs does
// not hold up the others.
func TestDeliveryPoison(t *testing.T) {
	for _, fail := range []func(http.ResponseWriter, *http.Request){
		func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	} {
		logged(t)
		m := newRecorder(t)
		inner := newHandler((&monitor{stored: func(s storedReading) error { m.readings <- s; return nil }}).methods())
		u := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			if bytes.Contains(body, []byte("poison")) {
				m.tries.Add(1)
				fail(w, r)
				return
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
			inner.ServeHTTP(w, r)
		}))
		d := newDelivery(newClient(u, time.Second/2, nil), time.UTC, "nan", time.Millisecond, nil)
		d.put("poison", reading{taken: time.Now()})
		await(t, "it was tried", func() bool { return m.tries.Load() > 0 })
		puts(d, 1, 20)
		gets(t, m, 1, 20)
		d.discard("poison")
		within(patience, d.close)
	}
	// How long it waits grows, but not for what a long outage did to it.
	d := testDelivery(t, newRecorder(t))
	d.retry = time.Second
	p := &pendingReading{}
	for n := 1; n <= 3; n++ {
		d.record(p, d.monitor(), io.EOF)
		want := time.Second << (n - 1)
		if wait := time.Until(p.notBefore); wait < want/2-time.Second/4 || wait > want*3/2 {
			t.Errorf("got %v after %d failures; want %v ±50 %%", wait, n, want)
		}
		for i := 0; i < 20; i++ {
			d.record(p, d.monitor(), io.EOF)
		}
		locked(d, func() any { d.answered(time.Now()); return nil })
	}
}

// TestDeliveryFault: three faults drop a reading, fewer do not. They are spread
// out.
func TestDeliveryFault(t *testing.T) {
	lines := logged(t)
	m := newRecorder(t)
	m.set(func(w http.ResponseWriter, try int) bool {
		if try <= 5 {
			w.Write(encodeResponse(nil, faultf(1, "unknown ticket")))
		}
		return try <= 5
	})
	d := testDelivery(t, m)
	puts(d, 1, 1)
	await(t, "dropped", func() bool { return d.count().undelivered == 0 })
	puts(d, 2, 2)
	if gets(t, m, 2, 2); m.tries.Load() != 6 {
		t.Errorf("got %d tries; want 6", m.tries.Load())
	}
	if want := `^ticket 1: reading dropped: monitor .*: fault 1: unknown ticket\n$`; !regexp.MustCompile(want).MatchString(lines.String()) {
		t.Errorf("got %s; want %s", lines, want)
	}
	d.retry = time.Second
	p := &pendingReading{}
	for _, want := range []time.Duration{10 * time.Second, 20 * time.Second} {
		d.record(p, d.monitor(), faultf(1, "locked"))
		if wait := time.Until(p.notBefore); wait < want/2-time.Second || wait > want*3/2 {
			t.Errorf("got %v; want %v ±50 %%", wait, want)
		}
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

// TestDeliverySlow: a monitor that is slower than the sensors makes them wait;
// nothing is dropped.
func TestDeliverySlow(t *testing.T) {
	m := newRecorder(t)
	attempts, answer := hold(m)
	d := testDelivery(t, m)
	const n = 2 * maxPending
	put, before := make(chan int, n), time.Now()
	go func() {
		for i := 1; i <= n; i++ {
			d.waitRoom(context.Background())
			puts(d, i, i)
			put <- i
		}
	}()
	await(t, "a run waits", func() bool { return !d.stalledSince().IsZero() })
	if since := d.stalledSince(); len(put) != maxPending-roomForRuns || since.Before(before) {
		t.Errorf("got %d, stalled since %v; want %d, since later than %v", len(put), since, maxPending-roomForRuns, before)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	d.waitRoom(ctx) // which returns
	taken := time.Now()
	receive(t, "an attempt", attempts)
	answer <- 0
	await(t, "the next run waits", func() bool { return d.stalledSince().After(taken) })
	receive(t, "an attempt", attempts)
	m.set(nil)
	answer <- 0
	if gets(t, m, 1, n); !d.stalledSince().IsZero() {
		t.Errorf("stalled since %v", d.stalledSince())
	}
}

// TestDeliveryFull: more than 1,024 readings in memory push out the oldest.
func TestDeliveryFull(t *testing.T) {
	m := newRecorder(t)
	attempts, answer := hold(m)
	d := testDelivery(t, m)
	puts(d, 0, 0)
	receive(t, "an attempt", attempts)
	puts(d, 1, maxPending+10)
	m.set(nil)
	answer <- 503
	gets(t, m, 11, maxPending+10)
	if totals := d.count(); totals.dropped != 11 {
		t.Errorf("got %d dropped; want 11", totals.dropped)
	}
}

// TestDeliveryDiscard: a ticket that was given away again takes the pending
// reading with it, also the one that is just being sent.
func TestDeliveryDiscard(t *testing.T) {
	m := newRecorder(t)
	attempts, answer := hold(m)
	d := testDelivery(t, m)
	puts(d, 1, 1)
	receive(t, "an attempt", attempts)
	puts(d, 2, 2)
	d.discard(1)
	d.discard(2)
	for ticket := 1; ticket <= 2; ticket++ {
		d.put(ticket, reading{value: "new", taken: time.Now()})
	}
	m.set(nil)
	answer <- 500
	for range [2]int{} {
		if got := receive(t, "reading", m.readings); got.value != "new" {
			t.Errorf("got %+v; want new ones", got)
		}
	}
}

// TestDeliveryClose: at the end each reading is tried once more, although the
// monitor fails or hangs at some; what is under way then says nothing of the
// monitor; and one that is away does not hold up the end.
func TestDeliveryClose(t *testing.T) {
	for _, test := range []struct {
		name        string
		bad         func(try int) bool
		hangs       bool
		least, most int // delivered of 10
		log         string
	}{
		{"fails", func(try int) bool { return try == 1 || try == 3 }, false, 9, 9, "1 reading not delivered"},
		{"hangs", func(try int) bool { return try == 1 || try == 3 }, true, 9, 9, "1 reading not delivered"},
		{"is slow", func(try int) bool { return try == 1 }, true, 10, 10, ""},
		{"is away", func(int) bool { return true }, false, 0, 0, "10 readings not delivered"},
	} {
		test, lines, m, end := test, logged(t), newRecorder(t), make(chan struct{})
		m.set(func(w http.ResponseWriter, try int) bool {
			if test.bad(try) && test.hangs {
				<-end
			} else if test.bad(try) {
				w.WriteHeader(500)
			}
			return test.bad(try)
		})
		d := newDelivery(newClient(m.url, patience, nil), time.UTC, "nan", time.Hour, nil)
		puts(d, 1, 10)
		await(t, "an attempt", func() bool { return m.tries.Load() == 1 })
		if !test.hangs {
			await(t, "it failed", func() bool { return isAway(d) })
		}
		within(patience, d.close)
		close(end)
		if n := len(m.readings); n < test.least || n > test.most || m.tries.Load() > 11 {
			t.Errorf("%s: got %d readings in %d tries; want %d to %d of 10", test.name, n, m.tries.Load(), test.least, test.most)
		}
		if got := lines.String(); !strings.Contains(got, test.log) || test.log == "" && got != "" {
			t.Errorf("%s: got %q; want %q", test.name, got, test.log)
		}
		if test.name == "is away" && m.tries.Load() != 1+lastMisses {
			t.Errorf("got %d tries; want %d", m.tries.Load(), 1+lastMisses)
		}
	}

	m := newRecorder(t)
	_, answer := hold(m)
	defer close(answer)
	d := newDelivery(newClient(m.url, patience, nil), time.UTC, "nan", time.Hour, nil)
	puts(d, 1, 1)
	await(t, "an attempt", func() bool { return m.tries.Load() == 1 })
	lines := logged(t)
	within(0, d.close)
	if got := lines.String(); !strings.Contains(got, "1 reading not delivered") || strings.Contains(got, "away") {
		t.Errorf("got %s; want a word on one reading alone", got)
	}
}

// A faultyProxy stands between a delivery and its monitor: the next
// connections carry so many bytes in all, requests and answers together, and
// then end in one way or another.
type faultyProxy struct {
	net.Listener
	to    string
	links sync.WaitGroup

	mu      sync.Mutex // guards what is below
	tries   int        // connections that came
	faulty  int        // of those to come, so many fail
	carry   int        // bytes of one that fails
	then    string     // reset, finish, or hold: nothing is passed on any more
	request int        // bytes that went to the monitor on the latest connection
	all     int        // bytes that went either way
	open    []net.Conn
}

// newFaultyProxy returns a proxy that is there until the test ends.
func newFaultyProxy(t *testing.T, to string) *faultyProxy {
	p := &faultyProxy{to: to}
	p.listen(t, "127.0.0.1:0")
	t.Cleanup(func() {
		p.Close()
		p.mu.Lock()
		for _, c := range p.open {
			c.Close()
		}
		p.open = nil
		p.mu.Unlock()
		p.links.Wait()
	})
	return p
}

func (p *faultyProxy) listen(t *testing.T, address string) {
	t.Helper()
	var err error
	if p.Listener, err = net.Listen("tcp", address); err != nil {
		t.Fatal(err)
	}
	p.links.Add(1)
	go func(l net.Listener) {
		defer p.links.Done()
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			if far, err := net.Dial("tcp", p.to); err == nil {
				p.link(near.(*net.TCPConn), far.(*net.TCPConn))
			} else {
				near.Close()
			}
		}
	}(p.Listener)
}

// fail makes the next connections fail, and counts from here on.
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

// carried returns how many bytes the latest connection carried.
func (p *faultyProxy) carried() (request, all int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.request, p.all
}

// link passes on what comes from either side, as much as it may.
func (p *faultyProxy) link(near, far *net.TCPConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tries++
	left, then := 1<<30, ""
	if p.tries <= p.faulty {
		left, then = p.carry, p.then
	}
	p.request, p.all = 0, 0
	p.open = append(p.open, near, far)
	end := func() {
		for _, c := range []*net.TCPConn{near, far} {
			if then == "reset" {
				c.SetLinger(0)
			}
			c.Close()
		}
	}
	if left == 0 && then != "hold" {
		end()
	}
	pass := func(to, from *net.TCPConn) {
		defer p.links.Done()
		defer end()
		buffer := make([]byte, 32<<10)
		for over := false; !over; {
			n, err := from.Read(buffer)
			p.mu.Lock()
			n = min(n, left)
			left -= n
			to.Write(buffer[:n]) // a side that has gone is noticed where it is read
			p.all += n
			if to == far {
				p.request += n
			}
			over = err != nil || left == 0 && then != "hold"
			p.mu.Unlock()
		}
	}
	p.links.Add(2)
	go pass(far, near)
	go pass(near, far)
}

// emptied waits until a delivery has nothing left, and leaves no connection.
func emptied(t *testing.T, what string, d *delivery) {
	t.Helper()
	await(t, what, func() bool { return d.count().undelivered == 0 })
	d.monitor().close()
}

// proxiedDelivery delivers to a recorder through a proxy.
func proxiedDelivery(t *testing.T, timeout time.Duration) (*recorder, *faultyProxy, *delivery) {
	m := newRecorder(t)
	p := newFaultyProxy(t, m.url.Host)
	u := *m.url
	u.Host = p.Addr().String()
	d := newDelivery(newClient(&u, timeout, nil), time.UTC, "nan", time.Millisecond, nil)
	t.Cleanup(func() { within(patience, d.close) })
	return m, p, d
}

// storedTickets counts how often a recorder got each ticket.
func storedTickets(m *recorder) map[any]int {
	stored := make(map[any]int)
	for len(m.readings) > 0 {
		stored[(<-m.readings).ticket]++
	}
	return stored
}

// TestNetworkFaults: whatever happens on the way to the monitor, or in it, a
// reading that it has not answered is tried again until it is stored: once, or
// twice where the answer was lost; three faults are an answer.
func TestNetworkFaults(t *testing.T) {
	logged(t)
	m, p, d := proxiedDelivery(t, patience)
	d.put("00000", reading{value: "0.42", taken: time.Now()})
	emptied(t, "an exchange", d)
	request, all := p.carried()
	t.Run("refused", testRefused)
	t.Run("reset", func(t *testing.T) { testResets(t, m, p, d, request, all) })
	t.Run("update and move", testResetChanges)
	for _, test := range cases(t, "testdata/netfaults.txt") {
		test := test
		t.Run(test.name, func(t *testing.T) {
			if strings.Contains(test.text, "\nhold") {
				t.Parallel()
			}
			testNetworkFault(t, test.text, map[string]int{"none": 0, "request": request, "all": all})
		})
	}
}

// testNetworkFault makes what the text of a case says happen to one reading, and
// nothing to the next.
func testNetworkFault(t *testing.T, text string, lengths map[string]int) {
	var times, tries, least, most, more int
	var kind, where string
	figures, what, _ := strings.Cut(strings.TrimSpace(text), "\n")
	if n, err := fmt.Sscan(figures, &times, &tries, &least, &most); n != 4 {
		t.Fatal(err)
	}
	kind, argument, _ := strings.Cut(what, " ")
	fmt.Sscan(argument, &where, &more)
	timeout := patience
	if kind == "hold" {
		timeout = 3 * time.Second // what is good takes far less
	}
	m, p, d := proxiedDelivery(t, timeout)
	count := func() int { return int(m.tries.Load()) }
	if kind == "hold" || kind == "finish" {
		p.fail(times, lengths[where]+more, kind)
		count = p.count
	} else {
		m.set(func(w http.ResponseWriter, try int) bool {
			if try <= times {
				misanswer(w, kind, argument)
			}
			return try <= times
		})
	}
	sample := reading{value: "0.42", taken: time.Now()}
	d.put("00001", sample)
	emptied(t, "tried", d)
	if got := count(); got != tries {
		t.Errorf("got %d tries; want %d", got, tries)
	}
	d.put("00002", sample)
	emptied(t, "the next reading", d)
	stored := storedTickets(m)
	if n := stored["00001"]; n < least || n > most || stored["00002"] != 1 {
		t.Errorf("got %v; want the first %d to %d times, the second once", stored, least, most)
	}
	total("network faults survived", times)
}

// misanswer answers what no monitor should.
func misanswer(w http.ResponseWriter, kind, argument string) {
	switch kind {
	case "status":
		code, _ := strconv.Atoi(argument)
		w.Header().Set("Location", "/xmlrpc/")
		w.WriteHeader(code)
	case "answer":
		io.WriteString(w, argument)
	case "endless":
		for err := error(nil); err == nil; {
			_, err = io.WriteString(w, strings.Repeat(" ", 32<<10))
		}
	}
}

// testRefused: nobody listens for three attempts.
func testRefused(t *testing.T) {
	m, p, d := proxiedDelivery(t, patience)
	p.Close()
	d.put("00001", reading{value: "0.42", taken: time.Now()})
	await(t, "three attempts", func() bool { return locked(d, func() bool { return d.misses >= 3 }) })
	p.listen(t, p.Addr().String())
	emptied(t, "delivered", d)
	if stored := storedTickets(m); stored["00001"] != 1 || p.count() != 1 {
		t.Errorf("got %v in %d tries; want it stored once, at the first that came through", stored, p.count())
	}
}

// testResetChanges: an update or a move whose connection is reset, wherever that
// is, has either been made or has changed nothing, and its ticket says which.
func testResetChanges(t *testing.T) {
	dir := t.TempDir()
	m, readings := &monitor{packages: filepath.Join(dir, "packages")}, make(chan storedReading, 100)
	m.stored = func(s storedReading) error { readings <- s; return nil }
	archive := packageOf(t, entry("demo/", ""), entry("demo/check", printing(2)))
	writeTree(t, dir, map[string]string{"packages/demo.tar.bz2": string(archive), "sensors/demo/check": printing(1)})
	next := serve(t, newHandler(m.methods()))
	p := newFaultyProxy(t, next.Host)
	u := &url.URL{Scheme: "http", Host: p.Addr().String(), Path: "/xmlrpc/"}
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
		await(t, "it is known to be stored", func() bool { return a.delivery.count().undelivered == 0 })
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
func testResets(t *testing.T, m *recorder, p *faultyProxy, d *delivery, request, all int) {
	ticket := func(n int) string { return fmt.Sprintf("%05d", n+1) }
	for n := 0; n <= all; n++ {
		p.fail(1, n, "reset")
		d.put(ticket(n), reading{value: "0.42", taken: time.Now()})
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
	if got := limitKey("::ffff:1.2.3.4") + " " + limitKey("2001:db8::1:2:3:4"); got != "1.2.3.4 2001:db8::/64" {
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

// spooled reads what a spool holds undelivered, as ticket=value; nothing where
// there is none.
func spooled(t *testing.T, dir string) (list []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "readings"))
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
		t.Fatal(err)
	}
	found, err := (&spool{}).read(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range found {
		list = append(list, fmt.Sprintf("%v=%s", p.ticket, p.value))
	}
	return list
}

// awaitSpooled waits until a spool holds so many readings.
func awaitSpooled(t *testing.T, dir string, n int) {
	t.Helper()
	await(t, plural(n, "reading")+" on the disk", func() bool { return len(spooled(t, dir)) == n })
}

// awaitEmpty waits until the file of a spool is there and empty.
func awaitEmpty(t *testing.T, dir string) {
	t.Helper()
	await(t, "the file is empty", func() bool {
		info, err := os.Stat(filepath.Join(dir, "readings"))
		return err == nil && info.Size() == 0
	})
}

// afterAMinute makes a spool that could not be written be tried again.
func afterAMinute(d *delivery) {
	locked(d, func() any { d.spool.retryAt = time.Now(); d.mu.broadcast(); return nil })
}

func away(w http.ResponseWriter, _ int) bool { w.WriteHeader(503); return true }

// pendingOf is a reading in a spool that was taken at some moment.
func pendingOf(number uint64, ticket any, r reading, at clocks) *pendingReading {
	return &pendingReading{reading: r, ticket: ticket, takenAt: at, record: number}
}

// TestSpool: what could not be delivered is on the disk, and is delivered by
// the next agent with its ticket, value and time; then the file is empty. A
// monitor that is there costs no write.
func TestSpool(t *testing.T) {
	if s := newSpool("", 1<<20); s != nil {
		t.Error("without a directory there is a spool")
	}
	m, dir := newRecorder(t), filepath.Join(t.TempDir(), "deep", "spool")
	d := spoolDelivery(t, m, newSpool(dir, 1<<20))
	awaitEmpty(t, dir)
	before, err := os.Stat(filepath.Join(dir, "readings"))
	if err != nil || before.Mode() != 0o600 {
		t.Fatalf("got %v, %v", before, err)
	}
	for i := 1; i <= 50; i++ {
		puts(d, i, i)
		gets(t, m, i, i)
	}
	if now, err := os.Stat(filepath.Join(dir, "readings")); err != nil || now.Size() != 0 || !now.ModTime().Equal(before.ModTime()) {
		t.Errorf("written to: %v, %v", now, err)
	}
	m.set(away)
	taken := time.Now().Add(-time.Hour)
	tickets := []any{1, int64(1) << 40, "a \"b\"\né", ""}
	for i, ticket := range tickets {
		d.put(ticket, reading{code: i, value: fmt.Sprint(i, ".50"), taken: taken})
	}
	awaitSpooled(t, dir, len(tickets))
	d.discard(1)
	d.put(1, reading{code: -15, taken: taken})
	await(t, "the newer one is", func() bool { return slices.Contains(spooled(t, dir), "1=") && len(spooled(t, dir)) == 4 })
	within(patience, d.close)

	m.set(nil)
	d = spoolDelivery(t, m, newSpool(dir, 1<<20))
	want := map[any]string{tickets[1]: "1 1.50", tickets[2]: "2 2.50", tickets[3]: "3 3.50", 1: "-15 nan"}
	for range tickets {
		got := receive(t, "reading", m.readings)
		at, err := time.Parse(dateTimeLayout, string(got.time))
		if off := at.Sub(taken).Abs(); want[got.ticket] != fmt.Sprint(got.code, " ", got.value) || err != nil || off > 2*time.Second {
			t.Errorf("got %+v; want %q at %s", got, want[got.ticket], taken.UTC())
		}
		delete(want, got.ticket)
	}
	awaitEmpty(t, dir)
	if n := d.count().undelivered; n != 0 || len(m.readings) != 0 {
		t.Errorf("%d left, %d too many", n, len(m.readings))
	}
}

// TestSpoolOld: what version 1 left behind is delivered, and then the file is
// empty. It has readings of all types, marks, records of the clock and a last line
// that was cut off by a power cut.
func TestSpoolOld(t *testing.T) {
	text, err := os.ReadFile("testdata/spool/old")
	if err != nil {
		t.Fatal(err)
	}
	var s spool
	found, err := s.read(bytes.NewReader(text))
	if err != nil || len(found) != 5 || s.damaged != 1 || s.last != 7 || found[0].takenAt.wall.UnixMilli() != 1795654616904 {
		t.Errorf("got %+v, %+v, %v; want 5 readings, 1 damaged", found, s, err)
	}
	m, dir := newRecorder(t), t.TempDir()
	writeTree(t, dir, map[string]string{"readings": string(text)})
	spoolDelivery(t, m, newSpool(dir, 1<<20))
	got := make(map[any]string)
	for range [5]int{} {
		s := receive(t, "reading", m.readings)
		got[s.ticket] = fmt.Sprint(s.code, " ", s.value)
	}
	want := map[any]string{1: "0 0.42", int64(1) << 40: "-15 nan", "a \"b\"\né": "0 -1e6", 6: "65 nan", 5: "0 62.5"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v; want %v", got, want)
	}
	awaitEmpty(t, dir)
}

// TestSpoolDamage: any byte of a spool that is flipped, and any end that is
// missing, costs one reading.
func TestSpoolDamage(t *testing.T) {
	now, text := systemClocks()(), ""
	for i := uint64(1); i <= 4; i++ {
		text += readingRecord(pendingOf(i, fmt.Sprint("t", i), reading{value: "1"}, now), now)
	}
	read := func(text string) (left, damaged int, last uint64) {
		var s spool
		found, err := s.read(strings.NewReader(text))
		if err != nil || s.size != len(text) {
			t.Fatalf("got %v, size %d; want %d", err, s.size, len(text))
		}
		return len(found), s.damaged, s.last
	}
	if left, damaged, last := read(text); left != 4 || damaged != 0 || last != 4 {
		t.Errorf("got %d left, %d damaged, last %d", left, damaged, last)
	}
	if left, _, last := read(text + markRecord(2) + markRecord(9)); left != 3 || last != 9 {
		t.Errorf("got %d left, last %d", left, last)
	}
	for i := range text {
		for _, flip := range []byte{1, 0x80} {
			b := []byte(text)
			b[i] ^= flip
			least := 3
			if text[i] == '\n' { // two lines become one
				least = 2
			}
			if left, damaged, _ := read(string(b)); left < least || left > 3 || damaged == 0 {
				t.Fatalf("byte %d: %d left, %d damaged", i, left, damaged)
			}
		}
		whole := strings.Count(text[:i], "\n")
		if text[i] == '\n' { // which alone is missing
			whole++
		}
		if left, _, _ := read(text[:i]); left != whole {
			t.Fatalf("cut at %d: %d left", i, left)
		}
		if left, _, _ := read(text[:i] + "\n" + text); left != whole+4 { // written on after a torn record
			t.Fatalf("torn at %d: %d left", i, left)
		}
	}
	if left, damaged, _ := read(strings.Repeat("x", 100000) + "\n" + strings.Repeat("\x00", 5000) + "\n" + text); left != 4 || damaged != 100000/maxRecord+2 {
		t.Errorf("got %d left, %d damaged", left, damaged)
	}
}

// TestSpoolClock: a reading keeps the time it was taken at also where the clock
// was set later, in the same boot or before the power went.
func TestSpoolClock(t *testing.T) {
	birth := clocks{time.Unix(300, 0), 5 * time.Minute, "aaaaaaaa"}
	set := clocks{time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC), 65 * time.Minute, "aaaaaaaa"}
	text := readingRecord(pendingOf(1, 1, reading{value: "1"}, clocks{time.Unix(240, 0), 4 * time.Minute, "aaaaaaaa"}), birth)
	for _, test := range []struct {
		at   clocks
		want time.Time
	}{
		{birth, time.Unix(240, 0)},
		{set, set.wall.Add(-61 * time.Minute)},
		{clocks{set.wall, time.Second, "bbbbbbbb"}, time.Unix(240, 0)},
		{clocks{set.wall, time.Second, "aaaaaaaa"}, time.Unix(240, 0)}, // a container begun anew
	} {
		found, err := (&spool{}).read(strings.NewReader(text))
		if err != nil || len(found) != 1 {
			t.Fatalf("at %v: got %+v, %v", test.at, found, err)
		}
		if got := found[0].takenAt.corrected(test.at); !got.Equal(test.want) {
			t.Errorf("at %v: got %v; want %v", test.at, got, test.want)
		}
	}
	// When the clock is set, the file is written anew with the right times.
	m, dir := newRecorder(t), t.TempDir()
	m.set(away)
	d := spoolDelivery(t, m, newSpool(dir, 1<<20))
	var now atomic.Pointer[clocks]
	now.Store(&birth)
	locked(d, func() any { d.clocks = func() clocks { return *now.Load() }; return nil })
	puts(d, 1, 1)
	awaitSpooled(t, dir, 1)
	now.Store(&set)
	await(t, "the time is right", func() bool {
		text, err := os.ReadFile(filepath.Join(dir, "readings"))
		if err != nil {
			t.Fatal(err)
		}
		found, err := (&spool{}).read(bytes.NewReader(text))
		return err == nil && len(found) == 1 && found[0].takenAt.wall.Sub(set.wall.Add(-time.Hour)).Abs() < time.Minute
	})
}

// TestSpoolFull: the file stays within its limit, whatever comes; the oldest
// go, counted.
func TestSpoolFull(t *testing.T) {
	lines := logged(t)
	m, dir := newRecorder(t), t.TempDir()
	const limit, n = 64 << 10, 3000
	m.set(away)
	d := spoolDelivery(t, m, newSpool(dir, limit))
	puts(d, 0, 0)
	await(t, "away", func() bool { return isAway(d) })
	for i := 1; i < n; i += 100 {
		puts(d, i, min(i+99, n-1))
		await(t, "it is written", func() bool { return locked(d, func() bool { return d.inMemory == 0 }) })
		if info, err := os.Stat(filepath.Join(dir, "readings")); err != nil || info.Size() > limit {
			t.Fatalf("got %v, %v", info.Size(), err)
		}
	}
	within(0, d.close)
	left := spooled(t, dir)
	totals := d.count()
	if totals.dropped+totals.undelivered != n || len(left) != totals.undelivered || len(left) < limit/200 || left[len(left)-1] != "2999=2999" {
		t.Errorf("%d dropped, %d undelivered, %d on the disk, last %s", totals.dropped, totals.undelivered, len(left), left[len(left)-1])
	}
	if !strings.Contains(lines.String(), "reading dropped: the oldest of what the spool holds") {
		t.Errorf("got %s", lines)
	}
	m = newRecorder(t)
	spoolDelivery(t, m, newSpool(dir, limit))
	gets(t, m, n-len(left), n-1)
	awaitEmpty(t, dir)
}

// TestSpoolBroken: where it cannot be written, that is logged once, readings
// are kept in memory, and written when it works again.
func TestSpoolBroken(t *testing.T) {
	lines := logged(t)
	m, dir := newRecorder(t), filepath.Join(t.TempDir(), "spool")
	m.set(away)
	writeTree(t, filepath.Dir(dir), map[string]string{"spool": ""}) // a file where the directory belongs
	d := spoolDelivery(t, m, newSpool(dir, 1<<20))
	puts(d, 1, 5)
	failed := func() bool { return strings.Contains(lines.String(), "undelivered readings are in memory alone") }
	await(t, "it is logged", failed)
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	afterAMinute(d)
	awaitSpooled(t, dir, 5)
	// The file is taken away, and what was in it written again.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	puts(d, 6, 6)
	awaitSpooled(t, dir, 6)
	if got := lines.String(); strings.Count(got, "in memory alone") != 1 || strings.Count(got, "works again") != 1 {
		t.Errorf("got %s", got)
	}
	// Another agent does not get at it.
	other := newSpool(dir, 1<<20)
	if _, err := other.open(); err == nil || err.Error() != "another process uses it" {
		t.Errorf("got %v", err)
	}
	m.set(nil)
	gets(t, m, 1, 6)
	awaitEmpty(t, dir)
}

// TestSpoolLate: a spool whose disk comes late is read then, though the monitor
// takes all; but for what has had its ticket given away again meanwhile.
func TestSpoolLate(t *testing.T) {
	lines := logged(t)
	m, dir := newRecorder(t), filepath.Join(t.TempDir(), "spool")
	now, text := systemClocks()(), ""
	for i := 1; i <= 3; i++ {
		text += readingRecord(pendingOf(uint64(i), i, reading{value: "-1"}, now), now)
	}
	writeTree(t, filepath.Dir(dir), map[string]string{"spool": ""}) // in its way
	d := spoolDelivery(t, m, newSpool(dir, 1<<20))
	await(t, "it cannot be used", func() bool { return strings.Contains(lines.String(), "in memory alone") })
	d.discard(3)
	puts(d, 3, 3)
	gets(t, m, 3, 3)
	os.Remove(dir)
	writeTree(t, dir, map[string]string{"readings": text})
	afterAMinute(d)
	gets(t, m, 1, 2)
	if awaitEmpty(t, dir); len(m.readings) > 0 {
		t.Errorf("got %v, too", <-m.readings)
	}
}

// TestSpoolPlanted: what another user puts under the names of a spool, or on
// the path to it, makes root touch nothing elsewhere.
func TestSpoolPlanted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root has what others want")
	}
	now := systemClocks()()
	for _, test := range []struct {
		name  string
		plant func(dir, victim string) error
		want  string // the error; "" where the spool works
	}{
		{"a link to a file", func(dir, victim string) error { return os.Symlink(victim+"/file", dir+"/readings") }, "readings: too many levels"},
		{"a link to nothing", func(dir, victim string) error { return os.Symlink(victim+"/new", dir+"/readings") }, "readings: too many levels"},
		{"another name of a file", func(dir, victim string) error { return os.Link(victim+"/file", dir+"/readings") }, "not a plain file"},
		{"a FIFO", func(dir, _ string) error { return syscall.Mkfifo(dir+"/readings", 0o666) }, "not a plain file"},
		{"a directory", func(dir, _ string) error { return os.Mkdir(dir+"/readings", 0o777) }, "is a directory"},
		{"next: a link", func(dir, victim string) error { return os.Symlink(victim+"/file", dir+"/readings.next") }, ""},
		{"next: a FIFO", func(dir, _ string) error { return syscall.Mkfifo(dir+"/readings.next", 0o666) }, ""},
		{"next: a directory", func(dir, _ string) error { return os.Mkdir(dir+"/readings.next", 0o777) }, "file exists"},
		{"a link to a directory", func(dir, victim string) error { os.Remove(dir); return os.Symlink(victim, dir) }, "spool: not a directory (and a link"},
		{"a FIFO as directory", func(dir, _ string) error { os.Remove(dir); return syscall.Mkfifo(dir, 0o666) }, "spool: not a directory"},
	} {
		home, victim := t.TempDir(), t.TempDir()
		dir := filepath.Join(home, "spool")
		writeTree(t, victim, map[string]string{"file": "precious\n"})
		err := os.Mkdir(dir, 0o777)
		if err == nil {
			err = test.plant(dir, victim)
		}
		if err == nil {
			err = os.Chown(home, 65534, 65534)
		}
		if err != nil {
			t.Fatal(err)
		}
		s := newSpool(dir, 1<<20)
		_, err = s.open()
		if err == nil {
			err = s.rewrite([]*pendingReading{pendingOf(1, 1, reading{value: "1"}, now)}, now)
		}
		s.close()
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v; want %q", test.name, err, test.want)
		}
		info, err := os.Stat(victim + "/file")
		if got := readTree(t, victim); err != nil || info.Mode() != 0o755 || len(got) != 1 || got["file"] != "precious\n" {
			t.Errorf("%s: got %v, %v, %q", test.name, info.Mode(), err, got)
		}
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
	d := spoolDelivery(t, m, newSpool(dir, 1<<20))
	full := func() bool { return strings.Contains(lines.String(), "no space left on device") }
	n := 0
	for ; n < 3000 && !full(); n += 50 { // of which half fit
		puts(d, n, n+49)
		await(t, "it is written", func() bool { return full() || isAway(d) && locked(d, func() bool { return d.inMemory == 0 }) })
	}
	puts(d, n, n+99) // it goes on in memory
	n += 100
	if got := spooled(t, dir); len(got) < 500 || got[0] != "0=0" {
		t.Errorf("%d on the disk, the first %s", len(got), got[0])
	}
	m.set(nil)
	gets(t, m, 0, n-1)
	if got := strings.Count(lines.String(), "no space left"); got != 1 {
		t.Errorf("logged %d times", got)
	}
	await(t, "all are delivered", func() bool { return d.count().undelivered == 0 })
	afterAMinute(d)
	awaitEmpty(t, dir) // which takes no space
}

// FuzzSpool: whatever is in a spool's file, with the right checksums or not,
// it is read, and a reading in it is the same when it is written and read again.
func FuzzSpool(f *testing.F) {
	at := clocks{time.UnixMilli(1795633466690), 81299 * time.Second, "4b825dc6"}
	taken := func(number uint64, ticket any, r reading) string {
		return readingRecord(pendingOf(number, ticket, r, clocks{at.wall.Add(-time.Minute), at.age - time.Minute, at.boot}), at)
	}
	records := []string{
		taken(1, 7, reading{value: "0.42"}),
		taken(2, int64(1)<<40, reading{code: -15}),
		readingRecord(pendingOf(3, "a \"b\"\n\xffü", reading{code: 3, value: "-1e6"}, clocks{at.wall, 0, "-"}), at),
		markRecord(2),
		withChecksum("c 0 4b825dc6 81299000 1795633466690"),
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
				data = append(data, withChecksum(line)...)
			}
		}
		var s spool
		found, err := s.read(bytes.NewReader(data))
		lines := bytes.Count(data, []byte("\n")) + len(data)/maxRecord // one that is too long comes in pieces
		if len(data) > 0 && data[len(data)-1] != '\n' {
			lines++ // cut off, but for its end perhaps whole
		}
		if err != nil || len(found)+s.damaged > lines {
			t.Fatalf("got %d readings, %d damaged of %d lines, %v", len(found), s.damaged, lines, err)
		}
		for _, p := range found {
			if ticket := wireTicket(p.ticket); len(ticket) > 8*maxTicket {
				continue // no command has one
			}
			again, err := (&spool{}).read(strings.NewReader(readingRecord(p, at)))
			if err != nil || len(again) != 1 {
				t.Fatalf("%+v reads back as %+v, %v", p, again, err)
			}
			if a := again[0]; a.ticket != p.ticket || a.code != p.code || a.value != p.value || a.record != p.record {
				t.Fatalf("%+v reads back as %+v", p, a)
			}
		}
	})
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
	raw  map[int]string // replaces bytes of the header, from these on
}

// entry is a file of a package, or with a slash at the end of its name a directory.
func entry(name, body string) packed { return packed{Header: tar.Header{Name: name}, body: body} }

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
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		h.Size = int64(len(e.body))
		w.Flush() // what is before
		start := b.Len()
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if header := b.Bytes()[start:]; len(e.raw) > 0 {
			for at, bytes := range e.raw {
				copy(header[at:], bytes)
			}
			copy(header[148:], "        ")
			sum := 0
			for _, c := range header {
				sum += int(c)
			}
			copy(header[148:], fmt.Sprintf("%06o\x00 ", sum))
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	w.Flush()
	return append(b.Bytes(), make([]byte, 1024)...)
}

// textOf returns what "TEXT"*N stands for.
func textOf(t testing.TB, s string) string {
	t.Helper()
	quoted, err := strconv.QuotedPrefix(s)
	if err != nil {
		t.Fatalf("%s: %v", s, err)
	}
	text, _ := strconv.Unquote(quoted)
	if n, err := strconv.Atoi(strings.TrimPrefix(s[len(quoted):], "*")); err == nil {
		text = strings.Repeat(text, n)
	}
	return text
}

// entriesOf reads one line of testdata/packages.txt.
func entriesOf(t testing.TB, line string) (entries []packed) {
	t.Helper()
	fields := regexp.MustCompile(`"(\\.|[^"\\])*"(\*\d+)?|\S+`).FindAllString(line, -1)
	e, repeat := packed{Header: tar.Header{Name: fields[0]}, raw: make(map[int]string)}, 1
	if strings.HasPrefix(fields[0], `"`) {
		e.Name = textOf(t, fields[0])
	}
	for _, field := range fields[1:] {
		var err error
		switch key, value, _ := strings.Cut(field, "="); key {
		case "type":
			e.Typeflag = value[0]
		case "to":
			e.Linkname = value
		case "raw":
			var at int
			var bytes string
			_, err = fmt.Sscanf(value, "%d:%x", &at, &bytes)
			e.raw[at] = bytes
		case "repeat":
			repeat, err = strconv.Atoi(value)
		default:
			if field[0] == '"' {
				e.body += textOf(t, field)
			} else {
				e.Mode, err = strconv.ParseInt(field, 8, 32)
			}
		}
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
	}
	for i := 0; i < repeat; i++ {
		next := e
		next.Name = strings.ReplaceAll(e.Name, "#", strconv.Itoa(i))
		entries = append(entries, next)
	}
	return entries
}

// A refusedPackage is a case of testdata/packages.txt.
type refusedPackage struct {
	name, want string
	archive    []byte
	limit      int64
}

func refusedPackages(t testing.TB) (list []refusedPackage) {
	t.Helper()
	for _, test := range cases(t, "testdata/packages.txt") {
		p := refusedPackage{name: test.name, limit: 2 << 20}
		var entries []packed
		file, then, cutTo := "", "", -1
		for _, line := range strings.Split(strings.TrimSuffix(test.text, "\n"), "\n") {
			switch key, value, _ := strings.Cut(line, " "); key {
			case "want":
				p.want = value
			case "file":
				file = value
			case "then":
				then = textOf(t, value)
			case "cut":
				cutTo, _ = strconv.Atoi(value)
			case "limit":
				p.limit, _ = strconv.ParseInt(value, 10, 64)
			default:
				entries = append(entries, entriesOf(t, line)...)
			}
		}
		if p.archive = packageOf(t, entries...); file != "" {
			p.archive = readFile(t, "testdata/packages/"+file)
		}
		if cutTo >= 0 {
			p.archive = p.archive[:cutTo]
		}
		p.archive = append(p.archive, then...)
		list = append(list, p)
	}
	return list
}

func readFile(t testing.TB, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

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
		if err != nil || e.IsDir() {
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

// leftovers lists what an update must not leave in these directories.
func leftovers(t testing.TB, dirs ...string) (left []string) {
	t.Helper()
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(dir, ".*"))
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, files...)
	}
	return left
}

// testUpdater returns an updater of dir/sensors and dir/backup with these
// files in them, which takes packages of 1 MiB that unpack to 2 MiB.
func testUpdater(t testing.TB, dir string, before map[string]string) *updater {
	t.Helper()
	writeTree(t, dir, before)
	writeTree(t, dir, map[string]string{"sensors/": "", "backup/": ""})
	s := newSensors(filepath.Join(dir, "sensors"), "check", "options", patience, nil)
	return newUpdater(s, filepath.Join(dir, "backup"), "", 1<<20, 2<<20, 3)
}

// at is a path among the sensors.
func (u *updater) at(elements ...string) string {
	return filepath.Join(append([]string{u.sensors.path}, elements...)...)
}

// demoBackups lists the backups of demo, oldest first.
func demoBackups(t testing.TB, u *updater) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(u.backup, "demo_*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
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

// demo is a package of the sensor demo, which prints a number.
func demo(t testing.TB, n int, more ...packed) source {
	t.Helper()
	return fromBytes(packageOf(t, append([]packed{entry("demo/check", printing(n))}, more...)...), "")
}

func TestInstall(t *testing.T) {
	one, two, packages := printing(1), printing(2), "testdata/packages/"
	type tree = map[string]string
	shipped := tree{
		"sensors/demo/check": "#!/bin/sh\n. ./lib/answer\n" +
			"case $1 in options) echo \"answer  the answer\" ;; *) echo $answer ;; esac\n",
		"sensors/demo/lib/answer": "answer=42\n", "sensors/demo/version": "1.0\n",
	}
	tests := []struct {
		name          string
		before, after tree
		from          source
	}{
		{"bzip2", nil, shipped, fromFile(packages + "demo.tar.bz2")},
		{"gzip", nil, shipped, fromFile(packages + "demo.tar.gz")},
		{"with ./", nil, shipped, fromFile(packages + "dot.tar.bz2")},
		{"PAX", nil, shipped, fromFile(packages + "pax.tar.bz2")},
		{"the executable alone", nil, tree{"sensors/demo/check": one}, demo(t, 1)},
		{"directories after what is in them", nil, tree{"sensors/demo/check": one, "sensors/demo/a/b/c": "d"},
			demo(t, 1, entry("demo/a/b/c", "d"), entry("demo/a/", ""), entry("demo/", ""))},
		{"something behind the end", nil, tree{"sensors/demo/check": one},
			fromBytes(append(packageOf(t, entry("demo/check", one)), one...), "")},
		{"replaced", tree{"sensors/demo/check": one, "sensors/demo/data": "x", "sensors/other/check": one},
			tree{"sensors/demo/check": two, "sensors/other/check": one,
				"backup/demo_TIME/check": one, "backup/demo_TIME/data": "x"}, demo(t, 2)},
		{"a newer version", tree{"sensors/demo/check": one, "sensors/demo/version": "1.9\n"},
			tree{"sensors/demo/check": two, "sensors/demo/version": "1.10",
				"backup/demo_TIME/check": one, "backup/demo_TIME/version": "1.9\n"},
			demo(t, 2, entry("demo/version", "1.10"))},
		{"left by a power cut", tree{
			"sensors/.picket-new-../x": "z", "sensors/.picket-old-./x": "z", "sensors/.picket-new-/x": "z", // no sensors
			"sensors/.sensors.picket-staging-1/x/y": "z", ".sensors.picket-staging-2/x": "z",
			".sensors2.picket-staging-3/x": "of sensors2", "sensors/.picket-gone-x/y": "z",
			"backup/.x_2026-01-01T00:00:00/y": "z", "backup/.profile": "mine",
		}, tree{"sensors/demo/check": one, "backup/.profile": "mine", ".sensors2.picket-staging-3/x": "of sensors2"},
			demo(t, 1)},
	}
	for _, test := range tests {
		dir := t.TempDir()
		u := testUpdater(t, dir, test.before)
		if err := u.install(context.Background(), "demo", test.from); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		if got := readTree(t, dir); !reflect.DeepEqual(got, test.after) {
			t.Errorf("%s: got %q; want %q", test.name, got, test.after)
		}
		if r := u.sensors.read(context.Background(), "demo", nil, nil); r.code != 0 {
			t.Errorf("%s: got %+v", test.name, r)
		}
	}
}

// TestInstallModes: whatever the umask, the first sensor has the modes of its
// package without the dangerous ones, and the user of the sensors reaches it.
func TestInstallModes(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	dir := t.TempDir()
	s := newSensors(filepath.Join(dir, "new/sensors"), "check", "options", patience, nil)
	u := newUpdater(s, filepath.Join(dir, "backup"), "", 1<<20, 2<<20, 3)
	archive := packageOf(t, packed{Header: tar.Header{Name: "demo/", Mode: 0o7777}},
		packed{Header: tar.Header{Name: "demo/check", Mode: 0o6777, Uid: 12, Gid: 34}, body: printing(1)},
		packed{Header: tar.Header{Name: "demo/secret", Mode: 0o600}, body: "x"}, entry("demo/lib/data", ""))
	if err := u.install(context.Background(), "demo", fromBytes(archive, "")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{
		"new": os.ModeDir | 0o755, "new/sensors": os.ModeDir | 0o755, "backup": os.ModeDir | 0o700,
		"new/sensors/demo": os.ModeDir | 0o775, "new/sensors/demo/check": 0o775, "new/sensors/demo/secret": 0o600,
		"new/sensors/demo/lib": os.ModeDir | 0o755, "new/sensors/demo/lib/data": 0o755,
	} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode() != want || int(ownerOf(info).Uid) != os.Geteuid() {
			t.Errorf("%s: got %v, %v; want %v", name, info, err, want)
		}
	}
}

// TestInstallRefused: whatever is wrong with a package, nothing changes.
func TestInstallRefused(t *testing.T) {
	for _, test := range refusedPackages(t) {
		dir := t.TempDir()
		before := map[string]string{
			"sensors/demo/check": printing(0), "sensors/demo/version": "1.2.3.0\n", "backup/demo_TIME/check": "x",
		}
		u := testUpdater(t, dir, before)
		u.maxUnpacked = test.limit
		err := u.install(context.Background(), "demo", fromBytes(test.archive, ""))
		if !regexp.MustCompile("^(?s:" + test.want + ")$").MatchString(fmt.Sprint(err)) {
			t.Errorf("%s: got %v; want %s", test.name, err, test.want)
		}
		if got := readTree(t, dir); !reflect.DeepEqual(got, before) {
			t.Errorf("%s: got %q; want nothing changed", test.name, got)
		}
		if left := leftovers(t, dir, u.sensors.path, u.backup); len(left) > 0 {
			t.Errorf("%s: left %q", test.name, left)
		}
		total("hostile packages refused", 1)
	}
}

// TestInstallPipe: a pipe in the place of a file is an error at once.
func TestInstallPipe(t *testing.T) {
	dir := t.TempDir()
	u := testUpdater(t, dir, nil)
	u.keys = filepath.Join(dir, "key.pub")
	public, sign := signify(t, "keynum_1")
	archive := packageOf(t, entry("demo/check", printing(1)))
	good := map[string]string{"demo.tar": string(archive), "demo.tar.sig": sign(archive), "key.pub": public}
	for name := range good {
		pipe := filepath.Join(dir, name)
		os.Remove(pipe)
		if err := syscall.Mkfifo(pipe, 0o600); err != nil {
			t.Fatal(err)
		}
		for other, text := range good {
			if other != name {
				writeTree(t, dir, map[string]string{other: text})
			}
		}
		err := u.install(context.Background(), "demo", fromFile(filepath.Join(dir, "demo.tar")))
		if err == nil || !strings.Contains(err.Error(), name+": ") {
			t.Errorf("%s: got %v; want an error that names it", name, err)
		}
		os.Remove(pipe)
	}
}

// TestInstallLocked: a lock of another process fails a change and holds up
// nothing else. Others cannot lock the backups, and what they can lock does
// not matter.
func TestInstallLocked(t *testing.T) {
	u := testUpdater(t, t.TempDir(), map[string]string{"sensors/demo/check": printing(1)})
	lock := func(path string) *os.File {
		f, err := os.Open(path)
		if err == nil {
			err = flockWithin(context.Background(), f, syscall.LOCK_EX, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	defer lock(u.sensors.path).Close()
	if err := u.install(context.Background(), "demo", demo(t, 2)); err != nil {
		t.Errorf("with the sensors locked: %v", err)
	}
	if info, err := os.Stat(u.backup); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("got %v, %v; want backups that only their owner can open", info, err)
	}
	held := lock(u.backup)
	if texts, err := u.sensors.helpTexts(context.Background()); err != nil || len(texts) != 1 {
		t.Errorf("got %q, %v", texts, err)
	}
	if r := u.sensors.read(context.Background(), "none", nil, nil); r.code != codeNotFound {
		t.Errorf("got %+v", r)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := u.rollback(ctx, "demo"); err == nil || !strings.Contains(err.Error(), "another process is changing the sensors") {
		t.Errorf("got %v", err)
	}
	if err := u.recover(context.Background()); err != nil {
		t.Errorf("recover beside another process: %v", err)
	}
	held.Close()
	if err := os.RemoveAll(u.backup); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("sensors", u.backup); err != nil {
		t.Fatal(err)
	}
	err := u.rollback(context.Background(), "demo")
	if err == nil || !strings.Contains(err.Error(), "the same directory") {
		t.Errorf("got %v", err)
	}
}

// asUser calls work in a thread of its own, which has the rights of a user.
func asUser(t *testing.T, uid int, work func()) (done chan struct{}) {
	done = make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		id := uintptr(uid)
		_, _, err := syscall.RawSyscall(syscall.SYS_SETGROUPS, 0, 0, 0)
		_, _, err2 := syscall.RawSyscall(syscall.SYS_SETRESGID, id, id, id)
		_, _, err3 := syscall.RawSyscall(syscall.SYS_SETRESUID, id, id, id)
		if err != 0 || err2 != 0 || err3 != 0 {
			t.Error(err, err2, err3)
			return
		}
		work()
	}()
	return done
}

// plant does what the owner of a directory of sensors can to lead root
// elsewhere: it puts something in the place of a file or directory, and that back
// again, many times.
func plant(random *mathrand.Rand, dir, elsewhere string) {
	names := []string{".picket-lock", ".picket-new-demo", ".picket-gone-demo", ".picket-old-demo", "demo"}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	inner := []string{"", "lib", "check", "version", "lib/data", "demo", "demo/lib"}
	outer, name := names[random.Intn(len(names))], inner[random.Intn(len(inner))]
	if random.Intn(2) == 0 {
		outer, name = "demo", "lib"
	}
	file := filepath.Join(dir, outer, name)
	if os.MkdirAll(filepath.Join(dir, "demo/lib"), 0o755) == nil { // something to exchange
		os.WriteFile(filepath.Join(dir, "demo/lib/data"), nil, 0o644)
	}
	aside, trap := filepath.Join(dir, "aside"), filepath.Join(dir, "trap")
	if random.Intn(5) == 0 {
		syscall.Mkfifo(trap, 0o666)
	} else {
		os.Symlink(filepath.Join(elsewhere, strings.TrimPrefix(name, "demo")), trap)
	}
	for i := random.Intn(200); i >= 0; i-- {
		os.Rename(file, aside)
		os.Rename(trap, file)
		if i > 0 || random.Intn(3) > 0 {
			os.Rename(file, trap)
			os.Rename(aside, file)
		}
	}
	os.RemoveAll(aside)
	os.Remove(trap)
}

// otherUID is a user whom nobody knows.
const otherUID = 1234

// otherUsersBox returns an updater for root of sensors that belong to another
// user, as do more files of the box, and a directory that only root can read.
func otherUsersBox(t *testing.T, more ...string) (u *updater, elsewhere string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root changes the sensors of another user")
	}
	dir := t.TempDir()
	chmodUp(t, dir)
	u = testUpdater(t, filepath.Join(dir, "box"), map[string]string{"sensors/demo/check": printing(1), "sensors/demo/lib/data": "1"})
	if !slices.Contains(more, "backup") {
		os.Remove(u.backup)
	}
	for _, file := range append(more, "sensors", "sensors/demo", "sensors/demo/check", "sensors/demo/lib", "sensors/demo/lib/data") {
		if err := os.Chown(filepath.Join(dir, "box", file), otherUID, otherUID); err != nil {
			t.Fatal(err)
		}
	}
	elsewhere = filepath.Join(dir, "elsewhere")
	writeTree(t, elsewhere, map[string]string{"check": "secret", "version": "99", "lib/data": "secret"})
	for _, file := range []string{"", "check", "version", "lib", "lib/data"} {
		if err := os.Chmod(filepath.Join(elsewhere, file), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return u, elsewhere
}

// TestHostile: whatever the owner of the directory of sensors plants and
// exchanges there, root reads, writes, gives away and removes nothing elsewhere.
func TestHostile(t *testing.T) {
	for _, his := range [][]string{{}, {"backup"}, {".", "backup"}} {
		u, elsewhere := otherUsersBox(t, his...)
		before := describeTree(t, elsewhere)
		var over atomic.Bool
		done := asUser(t, otherUID, func() {
			for random := mathrand.New(mathrand.NewSource(1)); !over.Load(); {
				plant(random, u.sensors.path, elsewhere)
				if random.Intn(4) == 0 {
					plant(random, u.backup, elsewhere)
				}
			}
		})
		ctx, from := context.Background(), demo(t, 2, entry("demo/lib/data", "2"))
		for i := 0; i < 20; i++ { // each may fail
			u.install(ctx, "demo", from)
			u.rollback(ctx, "demo")
			u.recover(ctx)
			filepath.WalkDir(filepath.Dir(u.backup), func(file string, e fs.DirEntry, err error) error {
				if err == nil && e.Type().IsRegular() {
					if text, _ := os.ReadFile(file); strings.Contains(string(text), "secret") {
						t.Errorf("%q: %s holds what root alone can read", his, file)
					}
				}
				return nil
			})
			total("changes while their directories were exchanged", 3)
		}
		over.Store(true)
		receive(t, "the end of the exchanges", done)
		if after := describeTree(t, elsewhere); after != before {
			t.Errorf("%q: got %s; want %s", his, after, before)
		}
	}
}

// TestDir: an open directory is the same one wherever it is moved, and nothing
// that is done in it follows a link or waits for a pipe.
func TestDir(t *testing.T) {
	top := t.TempDir()
	writeTree(t, top, map[string]string{"d/": "", "elsewhere/file": "x", "elsewhere/lib/file": "x"})
	f, err := os.Open(filepath.Join(top, "d"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := dir{File: f, step: func(string) error { return nil }}
	elsewhere := filepath.Join(top, "elsewhere")
	before := describeTree(t, elsewhere)
	if err := errors.Join(os.Rename(filepath.Join(top, "d"), filepath.Join(top, "moved")), os.Symlink(elsewhere, filepath.Join(top, "d"))); err != nil {
		t.Fatal(err)
	}
	inner, err := d.mkdir("inner", 0o755)
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	if err := inner.write("new", strings.NewReader("y"), 0o644, nil); err != nil {
		t.Error(err)
	}
	for name, make := range map[string]func(path string) error{
		"file": func(path string) error { return os.Symlink(filepath.Join(elsewhere, "file"), path) },
		"lib":  func(path string) error { return os.Symlink(filepath.Join(elsewhere, "lib"), path) },
		"pipe": func(path string) error { return syscall.Mkfifo(path, 0o600) },
	} {
		if err := make(filepath.Join(top, "moved/inner", name)); err != nil {
			t.Fatal(err)
		}
		opened, err := inner.open(name, 0)
		if name != "pipe" && err == nil {
			t.Errorf("a link was followed: %s", name)
		}
		opened.Close()
	}
	if err := d.remove("inner"); err != nil || exists(filepath.Join(top, "moved/inner")) {
		t.Errorf("got %v; want inner removed", err)
	}
	if after := describeTree(t, elsewhere); after != before {
		t.Errorf("got %s; want %s", after, before)
	}
}

// TestOwner: what root installs among another user's sensors is his, so that
// his agent can change it, whatever he had planted there. A trial runs with his
// rights, and they are not enough to change the package.
func TestOwner(t *testing.T) {
	u, elsewhere := otherUsersBox(t)
	before := describeTree(t, elsewhere)
	for name, to := range map[string]string{".picket-lock": "check", ".picket-staging": "", ".picket-new-x": "", "y": "new"} {
		if err := os.Symlink(filepath.Join(elsewhere, to), u.at(name)); err != nil {
			t.Fatal(err)
		}
	}
	ctx := context.Background()
	u.sensors.credential = &syscall.Credential{Uid: otherUID, Gid: otherUID}
	tried := "#!/bin/sh\n[ $(id -u) = 1234 ] || exit 8\n{ echo >new || echo >>check || mv lib new; } 2>/dev/null && exit 9\necho 2\n"
	for _, name := range []string{"demo", "x", "y"} {
		archive := packageOf(t, entry(name+"/check", tried), entry(name+"/lib/data", ""))
		if err := u.install(ctx, name, fromBytes(archive, "")); err != nil {
			t.Error(err)
		}
	}
	if after := describeTree(t, elsewhere); after != before {
		t.Errorf("got %s; want %s", after, before)
	}
	if left := leftovers(t, filepath.Dir(u.backup), u.sensors.path, u.backup); len(left) > 0 {
		t.Errorf("left %q", left)
	}
	his := describeTree(t, u.sensors.path) + describeTree(t, u.backup)
	his = regexp.MustCompile(`.* L.*\n`).ReplaceAllString(his, "") // links are nobody's
	if others := regexp.MustCompile(`(?m)^\S+ \S+ 0 `).FindAllString(his, -1); len(others) > 0 {
		t.Errorf("got %s; want all to be his", his)
	}
	u.sensors.credential = nil
	receive(t, "his own changes", asUser(t, otherUID, func() {
		if err := u.install(ctx, "demo", demo(t, 3)); err != nil {
			t.Error(err)
		}
		if err := u.rollback(ctx, "demo"); err != nil {
			t.Error(err)
		}
	}))
	if got := u.ownerWarning(); got != "" {
		t.Errorf("got %q; want no warning", got)
	}

	// As tar left it where a user had packed it, and the backups are root's.
	if err := os.Chown(u.backup, 0, 0); err != nil {
		t.Fatal(err)
	}
	if got := u.ownerWarning(); !strings.Contains(got, "chown -R 0:0 "+u.sensors.path) {
		t.Errorf("got %q; want the chown to type", got)
	}
	if err := u.install(ctx, "demo", demo(t, 4)); err != nil {
		t.Error(err)
	}
	if err := u.rollback(ctx, "demo"); err != nil {
		t.Error(err)
	}
}

// chmodUp lets other users reach a temporary directory.
func chmodUp(t *testing.T, dir string) {
	t.Helper()
	for ; dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// describeTree tells all that there is in a directory, with owners, modes and contents.
func describeTree(t *testing.T, dir string) (text string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		content := ""
		if info.Mode().IsRegular() {
			content = string(readFile(t, file))
		}
		text += fmt.Sprintf("%s %v %d %d %q\n", file, info.Mode(), ownerOf(info).Uid, ownerOf(info).Nlink, content)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return text
}

func TestInstallNoSpace(t *testing.T) {
	f, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := (dir{File: f}).enoughSpace(1); err != nil {
		t.Error(err)
	}
	if err := (dir{File: f}).enoughSpace(1 << 60); err == nil || !strings.Contains(err.Error(), "no space: ") {
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
	archive := packageOf(t, entry("demo/", ""), entry("demo/check", printing(1)))
	public, sign := signify(t, "keynum_1")
	public2, sign2 := signify(t, "keynum_2")
	_, impostor := signify(t, "keynum_1")
	_, stranger := signify(t, "keynum_3")
	writeTree(t, dir, map[string]string{
		"keys/a.pub": public, "keys/b.pub": public2, "keys/README": "no key", "bad/a.pub": "rubbish", "none/": "",
	})
	signature := sign(archive)
	line := strings.Split(signature, "\n")[1]
	other := base64.StdEncoding.EncodeToString([]byte("RS" + strings.Repeat("x", 72)))
	tests := []struct{ keys, name, signature, want string }{
		{"keys", "demo", signature, "<nil>"},
		{"keys", "demo", strings.TrimSuffix(signature, "\n"), "<nil>"},
		{"keys", "demo", sign2(archive), "<nil>"},
		{"keys/b.pub", "demo", sign2(archive), "<nil>"},
		{"keys", "demo", stranger(archive), "signed with key 6b65796e756d5f33, which is not known"},
		{"keys", "demo", impostor(archive), "the signature does not fit the package"},
		{"keys", "demo", sign(archive[1:]), "the signature does not fit the package"},
		{"keys", "other", signature, `unpack "demo/": not in the directory "other", .*`},
		{"keys", "demo", "", "signature: its first line is no untrusted comment"},
		{"keys", "demo", "untrusted comment: x", "signature: it has one line only"},
		{"keys", "demo", "trusted comment: x\n" + line + "\n", "signature: its first line is no untrusted comment"},
		{"keys", "demo", signature + "\n", "signature: it has more than two lines"},
		{"keys", "demo", signature + line, "signature: it has more than two lines"},
		{"keys", "demo", "untrusted comment: x\r\n" + line + "\r\n", "signature: it has more than two lines"},
		{"keys", "demo", "untrusted comment: x\n" + line[4:] + "\n", "signature: .*"},
		{"keys", "demo", "untrusted comment: x\n!" + line[1:] + "\n", "signature: its second line is not base64: .*"},
		{"keys", "demo", "untrusted comment: x\n" + other + "\n", `signature: its algorithm is "RS"; want "Ed"`},
		{"keys", "demo", public, "signature: its second line holds 42 bytes; want 74"},
		{"bad", "demo", signature, "public key: .*a.pub: its first line is no untrusted comment"},
		{"none", "demo", signature, `public key: no \*.pub in .*`},
		{"nowhere", "demo", signature, "public key: .*no such file or directory"},
	}
	for _, test := range tests {
		u := testUpdater(t, dir, nil)
		u.keys = filepath.Join(dir, test.keys)
		got := fmt.Sprint(u.install(context.Background(), test.name, fromBytes(archive, test.signature)))
		if !regexp.MustCompile("^(verify: )?" + test.want + "$").MatchString(got) {
			t.Errorf("got %s; want %s", got, test.want)
		}
	}
}

// TestVerifyFlipped flips each bit of a signature and of a key behind the
// comment, which is not trusted, and one in each byte of a package.
func TestVerifyFlipped(t *testing.T) {
	dir := t.TempDir()
	archive := packageOf(t, entry("demo/check", printing(1)))
	public, sign := signify(t, "keynum_1")
	good := map[string]string{"package": string(archive), "signature": sign(archive), "key": public}
	file, err := os.Create(filepath.Join(dir, "package"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	verify := func(texts map[string]string) error {
		writeTree(t, dir, texts)
		c := &change{updater: testUpdater(t, dir, nil), ctx: context.Background(), archive: file}
		c.from = fromBytes(nil, texts["signature"])
		c.keys = filepath.Join(dir, "key")
		return c.verify()
	}
	if err := verify(good); err != nil {
		t.Fatal(err)
	}
	for what, text := range good {
		first, step := 8*(strings.Index(text, "\n")+1), 1
		if what == "package" {
			first, step = 0, 9
		}
		for i := first; i < 8*(len(text)-1); i += step {
			bad := []byte(text)
			bad[i/8] ^= 1 << (i % 8)
			texts := maps.Clone(good)
			if texts[what] = string(bad); verify(texts) == nil {
				t.Errorf("bit %d of the %s flipped: taken", i, what)
			}
			total("flipped bits refused by verification", 1)
		}
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

// TestRollback makes one change after the other and looks at what is in place,
// and at the backups, oldest first.
func TestRollback(t *testing.T) {
	dir := t.TempDir()
	u := testUpdater(t, dir, map[string]string{"sensors/demo/check": printing(1)})
	state := func() (state string) {
		for _, version := range append([]string{u.at("demo")}, demoBackups(t, u)...) {
			state += strings.Fields(string(readFile(t, filepath.Join(version, "check"))))[2]
		}
		return state
	}
	ctx := context.Background()
	if err := u.rollback(ctx, "demo"); err == nil || err.Error() != "there is no backup" {
		t.Errorf("got %v", err)
	}
	for _, step := range []struct {
		keep, version int // 0: roll-back
		want          string
	}{
		{3, 2, "21"}, {3, 3, "312"}, {3, 0, "213"}, {3, 0, "312"}, {3, 4, "4123"}, {3, 0, "3124"}, {3, 4, "4243"}, {3, 5, "5434"},
		{3, 1, "1345"}, {0, 7, "73451"}, {1, 8, "87"},
	} {
		u.keep = step.keep
		err := u.rollback
		if step.version > 0 {
			err = func(ctx context.Context, name string) error { return u.install(ctx, name, demo(t, step.version)) }
		}
		if err := err(ctx, "demo"); err != nil || state() != step.want {
			t.Fatalf("got %s, %v; want %s", state(), err, step.want)
		}
	}
	// Where the clock is behind, order is kept all the same.
	if err := os.Rename(demoBackups(t, u)[0], filepath.Join(u.backup, "demo_2999-12-31T23:59:59")); err != nil {
		t.Fatal(err)
	}
	u.keep = 2
	if err := u.install(ctx, "demo", demo(t, 9)); err != nil || state() != "978" || !exists(filepath.Join(u.backup, "demo_3000-01-01T00:00:00")) {
		t.Errorf("got %s, %v; want 978", state(), err)
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
		from := filepath.Join(t.TempDir(), "x")
		if err := os.Mkdir(from, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(from, filepath.Join(dir, "y")); errors.Is(err, syscall.EXDEV) {
			return dir
		}
	}
	return ""
}

// A crash is a change that a test stops dead at each step.
type crash struct {
	name    string
	before  map[string]string
	run     func(u *updater) error
	outcome []string // what is in place then: "" is nothing
	overlay bool     // the installed version cannot be renamed
}

func crashes(t testing.TB) []crash {
	backup := func(day, version int) map[string]string {
		dir := fmt.Sprintf("backup/demo_2026-01-0%dT00:00:00/", day)
		return map[string]string{dir + "check": printing(version), dir + "lib/data": strconv.Itoa(version)}
	}
	before := func(more ...map[string]string) map[string]string {
		files := map[string]string{"sensors/demo/check": printing(1), "sensors/demo/lib/data": "1"}
		for _, m := range more {
			maps.Copy(files, m)
		}
		return files
	}
	install := func(u *updater) error {
		return u.install(context.Background(), "demo", demo(t, 2, entry("demo/lib/data", "2")))
	}
	rollback := func(u *updater) error { return u.rollback(context.Background(), "demo") }
	return []crash{
		{"update", before(), install, []string{"1", "2"}, false},
		{"deploy", map[string]string{}, install, []string{"", "2"}, false},
		{"rollback", before(backup(1, 2)), rollback, []string{"1", "2"}, false},
		{"overlay", before(), install, []string{"1", "2"}, true},
		{"prune", before(backup(1, 1), backup(2, 1), backup(3, 1)), install, []string{"1", "2"}, false},
	}
}

// updater returns an updater before the change, with its backups in a
// directory of other unless that is "".
func (c crash) updater(t testing.TB, other string) *updater {
	t.Helper()
	u := testUpdater(t, t.TempDir(), c.before)
	if other == "" {
		return u
	}
	dir, err := os.MkdirTemp(other, "")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range c.before {
		if rest, ok := strings.CutPrefix(name, "backup/"); ok {
			writeTree(t, dir, map[string]string{rest: text})
		}
	}
	u.backup = dir
	return u
}

// watch has step asked before each change of the file system.
func (c crash) watch(u *updater, step func(what string) error) {
	lower := c.overlay // until it is removed, demo is in the lower layer
	u.step = func(what string) error {
		err := step(what)
		if err == nil && what == "remove "+u.at("demo") {
			lower = false
		}
		if err == nil && lower && what == "rename "+u.at("demo") {
			err = syscall.EXDEV
		}
		return err
	}
}

var errDead = errors.New("dead")

// deadAt makes every step from the n-th on fail. A removal that is stopped has
// removed something already.
func (c crash) deadAt(u *updater, n int) (steps func() int) {
	count := 0
	c.watch(u, func(what string) error {
		if count++; count < n {
			return nil
		}
		if dir, ok := strings.CutPrefix(what, "remove "); ok && count == n {
			os.Remove(filepath.Join(dir, "check"))
			os.Remove(filepath.Join(dir, "demo", "check"))
		}
		return errDead
	})
	return func() int { return count }
}

// intact checks what the agent finds after a start: versions that are whole,
// none of those before the change is lost, and nothing else is left.
func (c crash) intact(t *testing.T, u *updater, where string) {
	t.Helper()
	if left := leftovers(t, filepath.Dir(u.sensors.path), u.sensors.path, u.backup); len(left) > 0 {
		t.Errorf("%s: left %q", where, left)
	}
	version := func(dir string) string { // of a complete sensor
		files := readTree(t, dir)
		if n := files["lib/data"]; len(files) == 2 && len(n) == 1 && strings.TrimSuffix(files["check"], n+"\n") == "#!/bin/sh\necho " {
			return n
		}
		t.Errorf("%s: half of a version in %s: %q", where, dir, files)
		return ""
	}
	got := ""
	if exists(u.at("demo")) {
		got = version(u.at("demo"))
	}
	if !slices.Contains(c.outcome, got) {
		t.Errorf("%s: got %q; want one of %q", where, got, c.outcome)
	}
	kept := map[string]bool{got: true}
	backups := demoBackups(t, u)
	for _, backup := range backups {
		kept[version(backup)] = true
	}
	for name, text := range c.before {
		if strings.HasSuffix(name, "/data") && !kept[text] {
			t.Errorf("%s: version %s is lost", where, text)
		}
	}
	if len(backups) > u.keep {
		t.Errorf("%s: %d backups", where, len(backups))
	}
}

// recovered recovers, after that was stopped at each of its steps, and returns
// how often it was stopped. The state before comes from setUp.
func (c crash) recovered(t *testing.T, where string, setUp func() *updater) (points int) {
	t.Helper()
	for m := 1; ; m++ {
		u := setUp()
		steps := c.deadAt(u, m)
		where := fmt.Sprintf("%s, recovery step %d", where, m)
		if err := u.recover(context.Background()); err != nil && !errors.Is(err, errDead) {
			t.Errorf("%s: %v", where, err)
		}
		last := steps() < m
		c.watch(u, func(string) error { return nil })
		if err := u.recover(context.Background()); err != nil {
			t.Errorf("%s: %v", where, err)
		}
		c.intact(t, u, where)
		if last {
			return m
		}
	}
}

// TestCrash stops every change dead at each of its steps, then recovery at
// each of its own, and looks at what the next start makes of it.
func TestCrash(t *testing.T) {
	others := []string{"", otherFileSystem(t)}
	if others[1] == "" {
		others = others[:1]
		defer t.Skip("no second file system on this machine")
	}
	for _, c := range crashes(t) {
		for _, other := range others {
			u := c.updater(t, other)
			steps := c.deadAt(u, 1<<30)
			if err := c.run(u); err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			done := c
			done.outcome = c.outcome[1:]
			done.intact(t, u, c.name)
			for n := 1; n <= steps(); n++ {
				total("points at which a change was stopped dead", 1)
				where := fmt.Sprintf("%s, backups in %q, step %d of %d", c.name, other, n, steps())
				total("times recovery was stopped dead after that", c.recovered(t, where, func() *updater {
					u := c.updater(t, other)
					c.deadAt(u, n)
					c.run(u)
					return u
				}))
			}
		}
	}
}

// TestUpgrade recovers what an older version left when it was interrupted.
func TestUpgrade(t *testing.T) {
	states := cases(t, "testdata/upgrade.txt")
	if len(states) < 100 {
		t.Fatalf("%d states only", len(states))
	}
	for _, state := range states {
		kind, _, _ := strings.Cut(state.name, ",")
		list := crashes(t)
		c := list[slices.IndexFunc(list, func(c crash) bool { return c.name == kind })]
		for _, remove := range []bool{false, true} { // the directory of backups, where it is empty
			if remove && strings.Contains(state.text, "backup/") {
				continue
			}
			total("times an older version's change was recovered", c.recovered(t, state.name, func() *updater {
				dir := t.TempDir()
				u := testUpdater(t, dir, nil)
				writeState(t, dir, state.text)
				if remove {
					if err := os.Remove(u.backup); err != nil {
						t.Fatal(err)
					}
				}
				return u
			}))
		}
	}
}

// writeState makes the files and directories of a case of testdata/upgrade.txt.
func writeState(t *testing.T, dir, text string) {
	t.Helper()
	for _, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		name, rest, _ := strings.Cut(line, " ")
		octal, body, isFile := strings.Cut(rest, " ")
		mode, err := strconv.ParseUint(octal, 8, 32)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		file := filepath.Join(dir, name)
		if isFile {
			writeTree(t, dir, map[string]string{name: textOf(t, body)})
		} else if err := os.MkdirAll(file, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, os.FileMode(mode)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestUnsettled: what an earlier change left and could not be settled is not
// taken for this one's, and holds up no other sensor.
func TestUnsettled(t *testing.T) {
	dir := t.TempDir()
	before := map[string]string{"sensors/demo/check": printing(2), "sensors/.picket-old-demo/check": printing(1)}
	u := testUpdater(t, dir, before)
	broken := errors.New("broken disk")
	u.step = func(what string) error {
		if what == "rename "+u.at(oldPrefix+"demo") || strings.HasPrefix(what, "mkdir "+u.backup) {
			return broken
		}
		return nil
	}
	ctx := context.Background()
	if err := u.install(ctx, "demo", demo(t, 3)); !errors.Is(err, broken) || !strings.Contains(err.Error(), "not settled") {
		t.Errorf("got %v", err)
	}
	if got := readTree(t, dir); !reflect.DeepEqual(got, before) {
		t.Errorf("got %q; want nothing changed", got)
	}
	if err := u.install(ctx, "other", fromBytes(packageOf(t, entry("other/check", printing(3))), "")); err != nil {
		t.Errorf("another sensor: %v", err)
	}
	u.step = func(string) error { return nil }
	if err := u.install(ctx, "demo", demo(t, 3)); err != nil {
		t.Error(err)
	}
	if got := string(readFile(t, u.at("demo", "check"))); got != printing(3) || len(demoBackups(t, u)) != 2 {
		t.Errorf("got %q, %q; want both versions before", got, demoBackups(t, u))
	}
}

// TestOneStepFails lets each step of an update fail once: an error means that
// nothing has changed.
func TestOneStepFails(t *testing.T) {
	broken := errors.New("broken disk")
	for _, c := range crashes(t) {
		count := 0
		for n := 1; n == 1 || count >= n-1; n++ {
			u := c.updater(t, "")
			before := readTree(t, filepath.Dir(u.backup))
			count = 0
			c.watch(u, func(string) error {
				if count++; count == n {
					return broken
				}
				return nil
			})
			err := c.run(u)
			u.step = func(string) error { return nil }
			if err := u.recover(context.Background()); err != nil {
				t.Errorf("%s, step %d: %v", c.name, n, err)
			}
			done := c
			if done.outcome = c.outcome[1:]; err != nil {
				done.outcome = c.outcome[:1]
			}
			done.intact(t, u, fmt.Sprintf("%s, step %d, %v", c.name, n, err))
			if after := readTree(t, filepath.Dir(u.backup)); err != nil && !reflect.DeepEqual(after, before) {
				t.Errorf("%s, step %d, %v: got %q; want nothing changed", c.name, n, err, after)
			}
		}
	}
}

// TestRecoverNothing: where nothing was interrupted, nothing is written.
func TestRecoverNothing(t *testing.T) {
	u := testUpdater(t, t.TempDir(), map[string]string{"sensors/demo/check": printing(1), "backup/demo_2026-01-01T00:00:00/check": printing(0), "backup/.profile": "mine"})
	for i := 0; i < 2; i++ {
		past := time.Unix(1e9, 0)
		for _, dir := range []string{filepath.Dir(u.sensors.path), u.sensors.path, u.backup} {
			if err := os.Chtimes(dir, past, past); err != nil && i == 0 {
				t.Fatal(err)
			}
		}
		if err := u.recover(context.Background()); err != nil {
			t.Error(err)
		}
		for _, dir := range []string{filepath.Dir(u.sensors.path), u.sensors.path, u.backup} {
			if info, err := os.Stat(dir); err == nil && !info.ModTime().Equal(past) {
				t.Errorf("%s has changed", dir)
			}
		}
		if err := os.RemoveAll(u.backup); err != nil { // nor is one made
			t.Fatal(err)
		}
	}
	if exists(u.backup) {
		t.Error("a directory of backups was made")
	}
}

// TestCrashKill does so with real processes and SIGKILL.
func TestCrashKill(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range crashes(t) {
		for n := 1; ; n++ {
			u := c.updater(t, "")
			cmd := exec.Command(self)
			cmd.Env = append(os.Environ(), fmt.Sprintf("PICKET_TEST_CRASH=%s %d %d", filepath.Dir(u.backup), i, n))
			out, err := cmd.CombinedOutput()
			where := fmt.Sprintf("%s, killed at step %d", c.name, n)
			if err := u.recover(context.Background()); err != nil {
				t.Errorf("%s: %v", where, err)
			}
			c.intact(t, u, where)
			if err == nil {
				break // it was through
			}
			if !strings.Contains(err.Error(), "killed") {
				t.Fatalf("%s: %v %s", where, err, out)
			}
			total("points at which a change was killed", 1)
		}
	}
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
	t := &testing.B{}
	u := testUpdater(t, dir, nil)
	crashes(t)[i].watch(u, die)
	if err := crashes(t)[i].run(u); err != nil {
		log.Fatal(err)
	}
}

// TestCrashConfig kills a process that changes client.cfg again and again, from
// outside and at random moments. The file is whole each time, and the next start
// removes what is left beside it.
func TestCrashConfig(t *testing.T) {
	const text = "[monitor]\nurl = http://%d/ ; here\n"
	if file := os.Getenv("PICKET_TEST_CONFIG"); file != "" { // this process is to be killed
		for i := 0; ; i = 1 - i {
			err := editINI(context.Background(), file, func(c *ini) error { return c.set("monitor", "url", fmt.Sprintf("http://%d/", i)) })
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	half := 0
	for i := 0; i < *kills; i++ {
		dir := t.TempDir()
		writeTree(t, dir, map[string]string{"client.cfg": fmt.Sprintf(text, 2)})
		file := filepath.Join(dir, "client.cfg")
		cmd := exec.Command(self, "-test.run=^TestCrashConfig$")
		cmd.Env = append(os.Environ(), "PICKET_TEST_CONFIG="+file)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		await(t, "first change", func() bool {
			now, err := os.ReadFile(file)
			return err == nil && string(now) != fmt.Sprintf(text, 2)
		})
		time.Sleep(time.Duration(mathrand.Int63n(int64(5 * time.Millisecond))))
		cmd.Process.Kill()
		cmd.Wait()
		if exists(nextFile(file)) {
			half++
		}
		if err := recoverINI(file); err != nil {
			t.Error(err)
		}
		got := readTree(t, dir)
		if whole := got["client.cfg"]; len(got) != 1 || whole != fmt.Sprintf(text, 0) && whole != fmt.Sprintf(text, 1) {
			t.Errorf("got %q; want one of two texts, and nothing else", got)
		}
	}
	total("kills of a change of client.cfg", *kills)
	if half == 0 && *kills >= 25 {
		t.Error("none was killed while it wrote")
	}
}

// TestUpdateUnderLoad: readings at full rate while their sensor is replaced a
// hundred times; none fails.
func TestUpdateUnderLoad(t *testing.T) {
	dir := t.TempDir()
	m := newRecorder(t)
	m.readings = make(chan storedReading, 1<<18) // received at the end
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
		if err := a.active.Load().updater.install(context.Background(), "demo", fromBytes(archive, "")); err != nil {
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
	total("readings during 100 updates", n)
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
	total("readings during 10 updates by another process", n)
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
	m := &monitor{packages: packages, stored: func(storedReading) error { return nil }}
	readings := make(chan storedReading, 10)
	m.stored = func(s storedReading) error { readings <- s; return nil }
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
	data := bytes.Repeat([]byte("0123456789"), 20001)
	text := base64.StdEncoding.EncodeToString(data)
	lines := regexp.MustCompile(".{76}").ReplaceAllString(text, "$0\r\n")
	packages := strings.NewReplacer("{text}", text, "{lines}", lines, "{100}", text[:100])
	var answer string
	u := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answer) }))
	c := newClient(u, patience, nil)
	defer c.close()
	for _, test := range answers(t, "package") {
		for _, line := range strings.Split(strings.TrimSuffix(test.text, "\n"), "\n") {
			answer = packages.Replace(expand(t, line))
			if !strings.Contains(line, "<?xml") && !strings.Contains(line, "<methodResponse>") {
				answer = xmlDeclaration + "\n<methodResponse>\n<params><param><value>" + answer + "</value></param></params></methodResponse>"
			}
			var got bytes.Buffer
			err := c.fetch(context.Background(), &got, 1<<20, "m")
			ok := err == nil && bytes.Equal(got.Bytes(), data)
			if test.name == "ok" && !ok || test.name != "ok" && !regexp.MustCompile("^"+test.name+"$").MatchString(fmt.Sprint(err)) {
				t.Errorf("%.100q: got %d bytes, %v; want %s", line, got.Len(), err, test.name)
			}
		}
	}
	hold := make(chan struct{})
	defer close(hold)
	c = newClient(serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "<methodResponse>")
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
		f.Add(readFile(f, file))
	}
	for _, p := range refusedPackages(f) {
		if len(p.archive) < 1<<14 {
			f.Add(p.archive)
		}
	}
	f.Add(packageOf(f, entry("demo/check", printing(1)), entry("demo/a/b/c", "d")))
	f.Fuzz(func(t *testing.T, archive []byte) {
		dir := t.TempDir()
		u := testUpdater(t, filepath.Join(dir, "in"), nil)
		u.maxUnpacked = 1 << 16
		c := &change{updater: u, ctx: context.Background(), name: "demo", from: fromBytes(archive, "")}
		look := func() error {
			err := c.unpack()
			size, in := 0, filepath.Join("in", filepath.Base(c.staging.Name()))
			for name, text := range readTree(t, dir) {
				if name == filepath.Join(in, "package") {
					continue
				}
				if size += len(text); !strings.HasPrefix(name, filepath.Join(in, "demo")+"/") {
					t.Errorf("%v: made %q", err, name)
				}
			}
			if size > 1<<16 {
				t.Errorf("%v: %d bytes unpacked", err, size)
			}
			return nil
		}
		if err := c.make(c.fetch, look); err != nil {
			t.Error(err)
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
	err := execute(context.Background(), make(chan os.Signal, 1), args, &out)
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
// no more, also over a connection or session that he has. Only a call that is
// being answered is answered.
func TestTLSReplaced(t *testing.T) {
	ours, theirs := newCA(t, "ours"), newCA(t, "theirs")
	box := ours.valid(t, "box")
	began, end := make(chan bool), make(chan bool)
	h := newHandler([]method{
		{"healthcheck", "string", "OK.", healthcheck},
		{"wait", "string", "", func(request, []any) (any, error) { began <- true; <-end; return "OK", nil }},
	})
	h.setAccess(&access{tls: serverTLS(box)})
	u := serve(t, h)
	u.Scheme = "https"
	config := clientTLS(ours.valid(t, "monitor"))
	config.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	trusted := func() *client {
		c := newClient(u, patience, config)
		c.http.Transport.(*http.Transport).IdleConnTimeout = patience
		t.Cleanup(c.close)
		return c
	}
	idle, waiting := trusted(), trusted()
	mustCall(t, idle, "healthcheck")
	answered := make(chan error, 1)
	go func() { _, err := waiting.call(context.Background(), "wait"); answered <- err }()
	receive(t, "the call that waits", began)
	sending, err := tls.Dial("tcp", u.Host, config)
	if err != nil {
		t.Fatal(err)
	}
	defer sending.Close()
	io.WriteString(sending, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n<")

	box.pool = theirs.valid(t, "x").pool
	h.setAccess(&access{tls: serverTLS(box)})
	close(end)
	if err := receive(t, "an answer", answered); err != nil {
		t.Errorf("a call that waited: %v", err)
	}
	for _, c := range []*client{idle, waiting} {
		if v, err := c.call(context.Background(), "healthcheck"); err == nil {
			t.Errorf("got %v", v)
		}
	}
	sending.SetReadDeadline(time.Now().Add(patience))
	if n, err := sending.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a call that came half: got %d bytes, %v", n, err)
	}
	other := theirs.valid(t, "monitor")
	other.pool = ours.valid(t, "x").pool
	c := newClient(u, patience, clientTLS(other))
	defer c.close()
	mustCall(t, c, "healthcheck")
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
	s, err := readSettings(filepath.Join(b.dir, "client.cfg"))
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
func (b *box) ask(t testing.TB, method string, params ...any) storedReading {
	t.Helper()
	mustCall(t, b.client, method, params...)
	return receive(t, "the outcome of "+method, b.readings)
}

// read runs a sensor without arguments.
func (b *box) read(t testing.TB, ticket any, sensor string) storedReading {
	t.Helper()
	return b.ask(t, "cmd_submit_reading", ticket, sensor)
}

// wants compares what the monitor gets: "ticket 7: exit 0, value 1".
func wants(t testing.TB, got storedReading, want string) {
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

// startIn starts a command that becomes the program, in dir.
func startIn(t testing.TB, dir string, cmd *exec.Cmd) *child {
	t.Helper()
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "PICKET_TEST_MAIN=1")
	return start(t, cmd)
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
	wantLog(t, &p.log, `reload: …client.cfg:1: no section header yet`)
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
	ask := func(args ...any) storedReading { asked++; return b.ask(t, "cmd_submit_reading", 1, "picket", args) }
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
	gets(t, b.recorder, 1, 3)
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
	b := newBox(t, "[sensor]\nconcurrency = 3\n", map[string]string{
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
	b.stored = func(storedReading) error { trying <- true; <-tried; return faultf(1, "not now") }
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
	b.readings = make(chan storedReading, 1<<20)
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
	stored map[any][]storedReading
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
		inner.stored = func(s storedReading) error {
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
		random: mathrand.New(mathrand.NewSource(2)), stored: make(map[any][]storedReading),
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
	settings, err := readSettings(filepath.Join(s.dir, "client.cfg"))
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
		s.agent.reload(context.Background())
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
	wantLog(t, &boot.log, `picket: /var/picket/client.cfg:2: [monitor] url: this is neither `)
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
	benchConcurrency = 3 // runs of one sensor at once, as many as the yardstick's
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

func BenchmarkParseINI(b *testing.B) {
	text, err := os.ReadFile("client.cfg")
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.SetBytes(int64(len(text)))
	for i := 0; i < b.N; i++ {
		c, err := parseINI("client.cfg", string(text))
		if err == nil {
			_, _, err = c.settings("")
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}
