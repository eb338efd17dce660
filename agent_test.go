package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"expvar"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"maps"
	"math/big"
	mathrand "math/rand"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
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
)

// Helpers come first, then tests in the order of the source files, then whole stories,
// fuzz targets and benchmarks. A helper of one test stands beside it. Tests use
// loopback and temporary directories only.

var (
	update   = flag.Bool("update", false, "rewrite the golden files of testdata")
	kills    = flag.Int("kills", 25, "how often TestKill kills the agent")
	soakTime = flag.Duration("soak", 3*time.Second, "how long TestSoak goes on")
	boxes    = flag.Int("boxes", 8, "how many agents TestManyBoxes has")
	probed   = flag.Duration("probed", 0, "how long TestManyBoxes goes on")
)

const probeInterval = 15 * time.Second // between two probes of a box in TestManyBoxes

// patience is how long a test waits for what must happen, before it fails.
const patience = 30 * time.Second

// ctx is for calls that nothing cuts short.
var ctx = context.Background()

// files are the texts of files by their names; a name that ends in a slash is a directory.
type files = map[string]string

func TestMain(m *testing.M) {
	os.Setenv("GORACE", "atexit_sleep_ms=0") // else each child takes a second to end
	if os.Getenv("PICKET_TEST_MAIN") != "" { // a child that is to be the program
		main()
		os.Exit(0)
	}
	flag.Parse()
	log.SetFlags(0)
	if !testing.Verbose() {
		log.SetOutput(io.Discard)
	}
	code := m.Run()
	os.RemoveAll(program.dir)
	totals.Do(func(total expvar.KeyValue) { fmt.Printf("total: %v %s\n", total.Value, total.Key) })
	os.Exit(code)
}

// totals counts what the tests have done. It is printed at the end.
var totals expvar.Map

// total counts what a test has done.
func total(what string, n int) { totals.Add(what, int64(n)) }

// parallel calls work n times at once, and waits for all of them.
func parallel(n int, work func(i int)) {
	var all sync.WaitGroup
	for i := 0; i < n; i++ {
		all.Add(1)
		go func(i int) {
			defer all.Done()
			work(i)
		}(i)
	}
	all.Wait()
}

// must ends the test at an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// expect wants something to hold, and otherwise says what a test got and what it wants.
func expect(t testing.TB, holds bool, format string, args ...any) {
	t.Helper()
	if !holds {
		t.Errorf(format, args...)
	}
}

// equal compares what a test got with what it wants.
func equal(t testing.TB, what string, got, want any) {
	t.Helper()
	expect(t, reflect.DeepEqual(got, want), "%s: got %+v; want %+v", what, got, want)
}

// has wants a text, an error or a log to have a part, in which … stands for any text.
func has(t testing.TB, what string, got any, part string) {
	t.Helper()
	text := fmt.Sprint(got)
	expect(t, like(text, "…"+part+"…"), "%s: got %s; want %s", what, text, part)
}

// like reports whether got is want, in which … stands for any text.
func like(got, want string) bool {
	pattern := strings.ReplaceAll(regexp.QuoteMeta(want), "…", ".*")
	return regexp.MustCompile("(?s)^" + pattern + "$").MatchString(got)
}

// await waits until what comes true.
func await(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: got nothing in %v", what, patience)
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
		t.Fatalf("%s: got nothing in %v", what, patience)
		panic("unreachable")
	}
}

// logged returns what is logged from here to the end of the test.
func logged(t *testing.T) fmt.Stringer {
	var b lockedBuffer
	before := log.Writer()
	log.SetOutput(&b)
	t.Cleanup(func() { log.SetOutput(before) })
	return &b
}

// A lockedBuffer may be written and read at the same time.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// severity is what a line of a log begins with that has one.
var severity = regexp.MustCompile(`(?m)^<\d>`)

// String returns the text without the severities of its lines.
func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return severity.ReplaceAllString(b.b.String(), "")
}

// wantLog waits until a log has a text, in which … stands for anything.
func wantLog(t testing.TB, log fmt.Stringer, text string) {
	t.Helper()
	for begun := time.Now(); time.Since(begun) < patience && !like(log.String(), "…"+text+"…"); {
		time.Sleep(time.Millisecond)
	}
	has(t, "the log", log, text)
}

func readFile(t testing.TB, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(file)
	must(t, err)
	return data
}

// writeTree makes files, which are executable, and directories. A process that is started
// meanwhile would have such a file open, and the file would be busy.
func writeTree(t testing.TB, dir string, tree files) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	for name, text := range tree {
		file := dir + "/" + name
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		if !strings.HasSuffix(name, "/") {
			must(t, os.WriteFile(filepath.Clean(file), []byte(text), 0o755))
		}
	}
}

// readTree returns the files of a directory, times in their names replaced by TIME.
func readTree(t testing.TB, dir string) files {
	t.Helper()
	tree := make(files)
	must(t, filepath.WalkDir(dir, func(file string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Type() == fs.ModeNamedPipe {
			return err
		}
		name := strings.TrimPrefix(file, filepath.Clean(dir)+"/")
		text, err := os.ReadFile(file)
		tree[regexp.MustCompile(`_\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d`).ReplaceAllString(name, "_TIME")] = string(text)
		return err
	}))
	return tree
}

// describeTree tells all that there is in a directory, with owners, modes and contents.
func describeTree(t *testing.T, dir string) (text string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		must(t, err)
		info, content := get(e.Info()), ""
		if info.Mode().IsRegular() {
			content = string(readFile(t, file))
		}
		text += fmt.Sprintf("%s %v %d %d %q\n", file, info.Mode(), ownerOf(info).Uid, ownerOf(info).Nlink, content)
		return nil
	}))
	return text
}

// leavesNothing wants no temporary file in these directories.
func leavesNothing(t testing.TB, where string, dirs ...string) {
	t.Helper()
	for _, dir := range dirs {
		left, err := filepath.Glob(filepath.Join(dir, ".*"))
		expect(t, err == nil && len(left) == 0, "%s: got %q, %v; want nothing left", where, left, err)
	}
}

// glob lists the files that a pattern fits, of which there must be one.
func glob(t testing.TB, pattern string) []string {
	t.Helper()
	list, err := filepath.Glob(pattern)
	if err != nil || len(list) == 0 {
		t.Fatalf("%s: got %q, %v; want files", pattern, list, err)
	}
	return list
}

// golden compares got with a file of testdata.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		must(t, os.WriteFile(file, []byte(got), 0o644))
	}
	equal(t, file, got, string(readFile(t, file)))
}

// splitLines returns the lines of a text without their ends.
func splitLines(text string) []string { return strings.Split(strings.TrimSuffix(text, "\n"), "\n") }

// A testCase is one of the cases that a file of testdata holds.
type testCase struct{ name, text string }

// cases reads a file of testdata. Each case begins with a line "-- NAME --" and
// goes on to the next such line; what stands before the first is for the reader.
func cases(t testing.TB, file string) (list []testCase) {
	t.Helper()
	for _, line := range strings.SplitAfter(string(readFile(t, file)), "\n") {
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

// shipped returns the shipped files whose names begin so, or skips the test where
// one is not as it is shipped: whoever uses picket changes client.cfg and sensors.
// testdata/shipped.txt has their checksums, as of sha256sum; -update renews them.
func shipped(t testing.TB, prefix string) files {
	const list = "testdata/shipped.txt"
	found, now := make(files), ""
	for _, line := range splitLines(string(readFile(t, list))) {
		_, name, _ := strings.Cut(line, "  ")
		text, _ := os.ReadFile(name) // it may be gone
		is := fmt.Sprintf("%x  %s", sha256.Sum256(text), name)
		now += is + "\n"
		if strings.HasPrefix(name, prefix) {
			found[name] = string(text)
			if is != line && !*update {
				t.Skipf("%s is not as it is shipped; if it is to be shipped so, run go test -update", name)
			}
		}
	}
	if *update {
		must(t, os.WriteFile(list, []byte(now), 0o644))
	}
	return found
}

// lockFile locks a file or directory, as another process does.
func lockFile(t testing.TB, path string) *os.File {
	t.Helper()
	f := get(os.Open(path))
	t.Cleanup(func() { f.Close() })
	must(t, syscall.Flock(int(f.Fd()), syscall.LOCK_EX))
	return f
}

// forEverybody lets other users into a temporary directory.
func forEverybody(t *testing.T, dir string) {
	for ; dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) {
		must(t, os.Chmod(dir, 0o755))
	}
}

// needs returns the path of a program, or skips the test.
func needs(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("no %s on this machine", name)
	}
	return path
}

// needsRoot skips the test if its user is not root.
func needsRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can")
	}
}

// findPython2 returns the path of a Python 2.7, or nothing: few machines have
// one, so no test depends on it.
func findPython2() string {
	const find = "for p in ~/.pyenv/versions/2.7*/bin/python2.7 python2.7; do $p -c 1 && echo $p && break; done"
	path, _ := exec.Command("sh", "-c", find).Output()
	return strings.TrimSpace(string(path))
}

// runTool runs a program in dir, and returns what it prints.
func runTool(t testing.TB, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
	return string(out)
}

// The program as make build makes it, which is built once.
var program struct {
	once sync.Once
	dir  string
}

// binary returns the path of the program.
func binary(t testing.TB) string {
	program.once.Do(func() {
		program.dir = get(os.MkdirTemp("", "picket-test-"))
		must(t, os.Chmod(program.dir, 0o755))
		goBuild(t, filepath.Join(program.dir, "picket"), ".")
	})
	return filepath.Join(program.dir, "picket")
}

func goBuild(t testing.TB, file, source string) string {
	t.Helper()
	t.Setenv("CGO_ENABLED", "0")
	linker := "-s -w -buildid= -X main.built=1 -X main.release=test"
	flags := []string{"build", "-trimpath", "-buildvcs=false", "-tags", "nethttpomithttp2", "-ldflags", linker}
	runTool(t, "", "go", append(flags, "-o", file, source)...)
	return file
}

// processes lists the processes, zombies too, whose directory in /proc fits.
func processes(fits func(dir string) bool) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		if fits(dir) {
			pid, _ := strconv.Atoi(filepath.Base(dir))
			pids = append(pids, pid)
		}
	}
	return pids
}

// mark puts a word into the environment of all processes that are started from
// here on, and returns it.
func mark(t *testing.T) (word string) {
	word = fmt.Sprint(t.Name(), time.Now().UnixNano())
	t.Setenv("PICKET_TEST_MARK", word)
	return word
}

// marked lists the processes that have a word in their environment.
func marked(word string) []int {
	return processes(func(dir string) bool {
		env, _ := os.ReadFile(dir + "/environ") // it may have ended
		return strings.Contains(string(env), "="+word+"\x00")
	})
}

// awaitNone waits until no process is left that has a word in its environment.
func awaitNone(t *testing.T, word string) {
	t.Helper()
	await(t, "no process is left", func() bool { return len(marked(word)) == 0 })
}

// openFiles counts the open files of this process.
func openFiles(t *testing.T) int { return len(get(os.ReadDir("/proc/self/fd"))) }

// residentMemory is a figure of /proc/PID/status, in KiB.
func residentMemory(t testing.TB, pid any, name string) int {
	t.Helper()
	_, figure, _ := strings.Cut(string(readFile(t, fmt.Sprintf("/proc/%v/status", pid))), name+":")
	return get(strconv.Atoi(strings.Fields(figure)[0]))
}

// A recorder is a monitor that keeps what it gets, and misbehaves on demand.
type recorder struct {
	*monitor // has packages and the next monitor, as a test wants them
	url      *url.URL
	readings chan storedReading
	tries    atomic.Int64

	mu        sync.Mutex
	misbehave func(w http.ResponseWriter, a attempt) bool // reports whether it has answered
}

func (m *recorder) set(misbehave func(w http.ResponseWriter, a attempt) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.misbehave = misbehave
}

// An attempt is a call that a recorder gets.
type attempt struct {
	method  string
	params  []any
	store   func() // does what the monitor would, but does not answer
	context context.Context
}

func newRecorder(t testing.TB) *recorder {
	m := &recorder{readings: make(chan storedReading, 10000)}
	m.monitor = &monitor{stored: func(s storedReading) error { m.readings <- s; return nil }}
	inner := newHandler(m.methods())
	inner.http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := attempt{context: r.Context(), store: func() { inner.ServeHTTP(httptest.NewRecorder(), r) }}
		body, _ := io.ReadAll(r.Body)
		a.method, a.params, _ = decodeCall(body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		m.mu.Lock()
		misbehave := m.misbehave
		m.mu.Unlock()
		if a.method != "healthcheck" { // which an agent that starts calls at any time
			m.tries.Add(1)
			if misbehave != nil && misbehave(w, a) {
				return
			}
		}
		inner.ServeHTTP(w, r)
	})
	m.url = serve(t, inner)
	return m
}

// away answers as a monitor that is out of order.
func away(w http.ResponseWriter, _ attempt) bool { w.WriteHeader(503); return true }

// listenRaw calls a function with each connection until the test ends, and closes the
// connection after it.
func listenRaw(t testing.TB, address string, serve func(net.Conn)) net.Listener {
	l := listen(t, address)
	var served sync.WaitGroup
	served.Add(1)
	go func() {
		defer served.Done()
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			served.Add(1)
			go func() { defer served.Done(); defer conn.Close(); serve(conn) }()
		}
	}()
	t.Cleanup(func() { l.Close(); served.Wait() })
	return l
}

// listen listens on loopback until the test ends.
func listen(t testing.TB, address string) net.Listener {
	l := get(net.Listen("tcp", address))
	t.Cleanup(func() { l.Close() })
	return l
}

// serve serves a handler on loopback until the test ends.
func serve(t testing.TB, h http.Handler) *url.URL {
	u, _ := serveOn(t, "127.0.0.1:0", h)
	return u
}

// serveOn serves a handler at an address.
func serveOn(t testing.TB, address string, h http.Handler) (*url.URL, *http.Server) {
	listener := listen(t, address)
	server := &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}
	run := server.Serve
	if h, ok := h.(*handler); ok {
		server, run = h.http, h.serve
	}
	done := make(chan struct{})
	go func() { defer close(done); run(listener) }()
	t.Cleanup(func() { server.Close(); <-done })
	return &url.URL{Scheme: "http", Host: listener.Addr().String(), Path: "/xmlrpc/"}, server
}

// dial connects, from an address of loopback or, with "", from any. The connection is
// closed when the test ends.
func dial(t testing.TB, address, from string) *net.TCPConn {
	conn := get((&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp", address))
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return conn.(*net.TCPConn)
}

// testClient returns a client that is closed when the test ends.
func testClient(t testing.TB, u *url.URL, rules *tls.Config) *client {
	c := newClient(u, patience, rules)
	t.Cleanup(c.close)
	return c
}

// idleTimeout is how long a client keeps a connection that it does not use.
func (c *client) idleTimeout() *time.Duration {
	return &c.http.Transport.(*http.Transport).IdleConnTimeout
}

// mustCall calls a method and wants it to succeed.
func mustCall(t testing.TB, c *client, name string, params ...any) any {
	t.Helper()
	v, err := c.call(ctx, name, params...)
	if err != nil {
		t.Fatalf("%s%v: %v", name, params, err)
	}
	return v
}

// fromJSON returns the elements of an array in JSON, whole numbers as int or i8.
func fromJSON(t *testing.T, text string) (list []any) {
	t.Helper()
	must(t, json.Unmarshal([]byte(text), &list))
	for i, v := range list {
		if number, ok := v.(float64); ok && number == float64(int32(number)) {
			list[i] = int(number)
		} else if ok && number == float64(int64(number)) {
			list[i] = int64(number)
		}
	}
	return list
}

// picket runs a command line in this process. It returns "exit CODE", what is
// printed, and the error as it would be logged.
func picket(args ...string) string {
	var out bytes.Buffer
	code, err := execute(ctx, args, &out)
	if err != nil {
		fmt.Fprintf(&out, "picket: %v\n", err)
	}
	return fmt.Sprintf("exit %d\n%s", code, &out)
}

// printing is a sensor that prints a number.
func printing(n int) string { return fmt.Sprintf("#!/bin/sh\necho %d\n", n) }

// A packed is one entry of a package that a test builds.
type packed struct {
	tar.Header
	body string
	raw  map[int]string // replaces bytes of the header, from these on
}

// entry is a file of a package, or with a slash at the end of its name a directory.
func entry(name, body string) packed { return packed{Header: tar.Header{Name: name}, body: body} }

// packageOf returns a package, not compressed, with these entries in order.
func packageOf(t testing.TB, entries ...packed) string {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		h.Size = int64(len(e.body))
		w.Flush() // what is before
		start := b.Len()
		must(t, w.WriteHeader(&h))
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
		get(io.WriteString(w, e.body))
	}
	w.Flush()
	return b.String() + strings.Repeat("\x00", 1024)
}

// demoPackage is a package of the sensor demo, which prints a number, and more.
func demoPackage(t testing.TB, n int, more ...packed) string {
	return packageOf(t, append([]packed{entry("demo/", ""), entry("demo/check", printing(n))}, more...)...)
}

// demo is the source of a demoPackage.
func demo(t testing.TB, n int, more ...packed) source {
	return fromText(demoPackage(t, n, more...), "")
}

// fromText is a source of a package that is in memory.
func fromText(archive, signature string) source {
	return func(_ context.Context, suffix string, to io.Writer) error {
		text := map[string]string{"": archive, ".sig": signature}[suffix]
		_, err := io.WriteString(to, text)
		return err
	}
}

// testUpdater returns an updater of dir/sensors and dir/backup with these
// files in them, which takes packages of 1 MiB that unpack to 2 MiB.
func testUpdater(t testing.TB, dir string, before files) *updater {
	writeTree(t, dir, before)
	writeTree(t, dir, files{"sensors/": "", "backup/": ""})
	s := newSensors(filepath.Join(dir, "sensors"), "check", "options", patience)
	backup := filepath.Join(dir, "backup")
	return &updater{sensors: s, backup: backup, maxPackage: 1 << 20, maxUnpacked: 2 << 20, keep: 3}
}

// at is a path among the sensors.
func (u *updater) at(elements ...string) string {
	return filepath.Join(append([]string{u.sensors.path}, elements...)...)
}

// signify makes a key pair and returns the public key's file and a function
// that signs.
func signify(t testing.TB, number string) (public string, sign func(string) string) {
	key, secret, err := ed25519.GenerateKey(nil)
	must(t, err)
	text := func(what string, data []byte) string {
		coded := base64.StdEncoding.EncodeToString(append([]byte("Ed"+number), data...))
		return "untrusted comment: " + what + "\n" + coded + "\n"
	}
	return text("picket public key", key), func(message string) string {
		return text("verify with picket.pub", ed25519.Sign(secret, []byte(message)))
	}
}

// testKey is the key of all certificates of tests.
var testKey = ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))

// A testCA signs certificates for tests.
type testCA struct{ cert *x509.Certificate }

// sign returns a certificate as PEM.
func (ca *testCA) sign(cert *x509.Certificate) string {
	cert.SerialNumber = big.NewInt(time.Now().UnixNano())
	der := get(x509.CreateCertificate(nil, cert, ca.cert, testKey.Public(), testKey))
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// files writes a certificate that is valid between two times, its key and the
// CA's certificate, and loads them.
func (ca *testCA) files(t testing.TB, name string, from, to time.Time) tlsFiles {
	dir := t.TempDir()
	cert := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: from, NotAfter: to, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: get(x509.MarshalPKCS8PrivateKey(testKey))})
	writeTree(t, dir, files{name + ".crt": ca.sign(cert), name + ".key": string(key), "ca.crt": ca.sign(ca.cert)})
	return loadTLS(t, dir, name)
}

// valid writes a certificate that is valid now.
func (ca *testCA) valid(t testing.TB, name string) tlsFiles {
	return ca.files(t, name, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
}

func newCA(t testing.TB, name string) *testCA {
	return &testCA{&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}}
}

// loadTLS loads the certificate of a name, its key and the CA's from dir.
func loadTLS(t testing.TB, dir, name string) tlsFiles {
	path := func(file string) string { return filepath.Join(dir, file) }
	f := tlsFiles{certificate: path(name + ".crt"), key: path(name + ".key"), ca: path("ca.crt")}
	if option, err := f.load(); err != nil {
		t.Fatal(option, err)
	}
	return f
}

// serveTLS serves methods over TLS.
func serveTLS(t testing.TB, methods []method, files tlsFiles) (*handler, *url.URL) {
	h := newHandler(methods)
	h.setAccess(&access{tls: serverTLS(files)})
	u := serve(t, h)
	u.Scheme = "https"
	return h, u
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
// address to listen at, and then more; its packages are in packages/.
func newBox(t testing.TB, more string, tree files) *box {
	b := &box{recorder: newRecorder(t), dir: t.TempDir()}
	b.packages = filepath.Join(b.dir, "packages")
	writeTree(t, b.dir, tree)
	b.configure(t, "[monitor]\nurl = "+b.url.String()+"\n[agent]\nlisten = 127.0.0.1:0\n"+more)
	return b
}

// configure gives the box another client.cfg.
func (b *box) configure(t testing.TB, text string) {
	t.Helper()
	b.config = text
	writeTree(t, b.dir, files{"client.cfg": text})
}

// run runs the agent in this process until the test ends.
func (b *box) run(t testing.TB) *agent {
	t.Helper()
	a := get(newAgent(get(readSettings(filepath.Join(b.dir, "client.cfg")))))
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- a.run(ctx) }()
	t.Cleanup(func() { cancel(); must(t, <-ended) })
	b.client = clientOf(t, a.listener.Addr().String())
	return a
}

// start runs the agent as a child.
func (b *box) start(t testing.TB, args ...string) *child {
	t.Helper()
	return b.startAs(t, self(t, b.dir, args...))
}

// startAs runs the agent as a child, by a command that becomes it.
func (b *box) startAs(t testing.TB, cmd *exec.Cmd) *child {
	t.Helper()
	p := start(t, cmd)
	b.client = clientOf(t, p.address(t))
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

// startTiny starts the agent in a memory cgroup of 16 MiB, and reports whether
// this machine has such groups. All that is in the group is killed when the test ends.
func (b *box) startTiny(t *testing.T) (p *child, limited bool) {
	t.Helper()
	const begin = `for file in /sys/fs/cgroup/memory/$0/memory.limit_in_bytes /sys/fs/cgroup/$0/memory.max; do
			mkdir ${file%/*} && echo 16M >$file && echo $$ >${file%/*}/cgroup.procs && break
		done 2>/dev/null
		exec "$1"`
	const end = `for dir in /sys/fs/cgroup/memory/$0 /sys/fs/cgroup/$0; do
			[ ! -d $dir ] || { kill -9 $(cat $dir/cgroup.procs); rmdir $dir || exit 1; }
		done`
	group := fmt.Sprint("picket-test-", time.Now().UnixNano())
	t.Cleanup(func() {
		await(t, "the cgroup is empty", func() bool { return exec.Command("sh", "-c", end, group).Run() == nil })
	})
	cmd := exec.Command("sh", "-c", begin, group, binary(t))
	cmd.Dir = b.dir
	p = b.startAs(t, cmd)
	return p, strings.Contains(string(readFile(t, fmt.Sprintf("/proc/%d/cgroup", p.Process.Pid))), group)
}

// wants compares what the monitor gets: "ticket 7: exit 0, value 1".
func wants(t testing.TB, got storedReading, want string) {
	t.Helper()
	has(t, "the reading", got, " 127.0.0.1 "+want)
}

// A child is a program that runs as a child of the test, and its log.
type child struct {
	*exec.Cmd
	log    lockedBuffer
	ended  chan struct{} // is closed when it has ended
	served int           // addresses of its log that a test knows
}

// servesAt matches the line with which a program says where it serves.
var servesAt = regexp.MustCompile(`(?:on|listening)"? (?:https?://|address=)?(127\.0\.0\.1:\d+)[,/\n]`)

// start starts a program and kills it when the test ends; one that fails shows the log.
func start(t testing.TB, cmd *exec.Cmd) *child {
	t.Helper()
	c := &child{Cmd: cmd, ended: make(chan struct{})}
	cmd.Stderr = &c.log
	must(t, cmd.Start())
	go func() { defer close(c.ended); c.Wait() }() // whose error is in ProcessState
	t.Cleanup(func() {
		c.Process.Kill()
		<-c.ended
		if t.Failed() {
			t.Logf("%s: %s", c.Path, &c.log)
		}
	})
	return c
}

// address waits until the program serves, and returns where; the next call waits for its
// next address.
func (c *child) address(t testing.TB) string {
	t.Helper()
	var found [][]string
	await(t, c.Path+" serves", func() bool {
		found = servesAt.FindAllStringSubmatch(c.log.String(), -1)
		return len(found) > c.served
	})
	c.served++
	return found[c.served-1][1]
}

func (c *child) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	must(t, c.Process.Signal(s))
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
	equal(t, "the exit code", c.wait(t), 0)
}

// clientOf returns a client of an agent at this address.
func clientOf(t testing.TB, address string) *client {
	return testClient(t, &url.URL{Scheme: "http", Host: address, Path: "/"}, nil)
}

// self is the command that runs this program in dir.
func self(t testing.TB, dir string, args ...string) *exec.Cmd {
	cmd := exec.Command(get(os.Executable()), args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "PICKET_TEST_MAIN=1")
	return cmd
}

// wrapped returns a command that becomes cmd: its arguments end with those of cmd.
func wrapped(cmd *exec.Cmd, name string, args ...string) *exec.Cmd {
	outer := exec.Command(name, append(append(args, cmd.Path), cmd.Args[1:]...)...)
	outer.Dir, outer.Env = cmd.Dir, cmd.Env
	return outer
}

// get returns the value of a call that never fails on a healthy machine, and panics if it does.
func get[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// dump returns all options of an INI text, one a line.
func dump(c *ini) string {
	var b strings.Builder
	for i, key := range c.keys {
		switch value, err := c.get(key.section, key.option); {
		case key == (iniKey{}): // a comment
		case key.option == "":
			fmt.Fprintf(&b, "[%s]\n", key.section)
		case c.line[key] != i+1: // overridden
		case err != nil:
			fmt.Fprintf(&b, "%s: %v\n", key.option, err)
		default:
			fmt.Fprintf(&b, "%s = %q\n", key.option, value)
		}
	}
	return b.String()
}

func TestINI(t *testing.T) {
	for _, file := range glob(t, "testdata/ini/*.ini") {
		text := string(readFile(t, file))
		c, err := parseINI(filepath.Base(file), text)
		got := dump(c)
		if err != nil {
			got = err.Error() + "\n"
		} else {
			equal(t, file, c.text, text)
		}
		golden(t, strings.TrimSuffix(file, ".ini")+".golden", got)
	}
	_, err := parseINI("x", strings.Repeat("x\n", 30))
	equal(t, "bad lines that are named", len(splitLines(err.Error())), maxBadLines)
	// UTF-16 with and without a mark, in either order, and what a shell of Windows appends.
	const le, be = "[\x00a\x00]\x00\n\x00", "\x00[\x00a\x00]\x00\n"
	for text, line := range map[string]int{"\xff\xfe" + le: 1, "\xfe\xff" + be: 1, le: 1, be: 1, "[a]\nx = 1\n" + le: 3} {
		_, err := parseINI("x", text)
		has(t, "UTF-16", err, fmt.Sprintf("x:%d: a NUL byte: the text, or a part of it, is UTF-16", line))
	}
}

// TestINIPython compares with the two parsers that these files were written
// for, as far as the dialects agree.
func TestINIPython(t *testing.T) {
	compare := func(python, file string) {
		equal(t, file, runTool(t, "", python, "testdata/ini/values.py", file, dump(get(readINI(file)))), "")
	}
	if python2 := findPython2(); python2 != "" {
		compare(python2, "testdata/ini/classic.ini")
		compare(python2, "testdata/ini/interpolation.ini")
	}
	// What picket wrote, Python 3 reads; it has no rem lines and no "".
	c := get(parseINI("", ""))
	for i, value := range []string{"", "plain", "100%", "%(none)s", "two\nlines", "a:b=c", "ü", "x;y", "[x]"} {
		must(t, c.set("section", fmt.Sprint("Option", i), value))
	}
	must(t, c.set(defaults, "d", "default"))
	dir := t.TempDir()
	writeTree(t, dir, files{"written.ini": c.text})
	compare(needs(t, "python3"), filepath.Join(dir, "written.ini"))
}

// TestINIEdit makes the changes of testdata/edits.txt.
func TestINIEdit(t *testing.T) {
	plain := strings.NewReplacer(`\r`, "\r", `\n`, "\n", `\t`, "\t", `\BOM`, byteMark, "\\\n", "")
	tests, text := cases(t, "testdata/edits.txt"), ""
	slices.Reverse(tests)
	for _, test := range tests {
		if test.text != "" { // else that of the case behind it
			text = test.text
		}
		before, after, _ := strings.Cut(plain.Replace(text), "=>\n")
		c, err := parseINI("x.ini", before)
		must(t, err)
		if words := strings.Split(plain.Replace(test.name), "|"); len(words) == 3 {
			err = c.set(words[0], words[1], words[2])
		} else {
			err = c.remove(words[0], words[1:]...)
		}
		where := fmt.Sprintf("%s in %q", test.name, before)
		if equal(t, where+" refused", err != nil, after == ""); err != nil {
			after = before
		}
		equal(t, where, c.text, after)
	}
}

// TestSettings checks texts of client.cfg; TestShippedConfig has the defaults.
func TestSettings(t *testing.T) {
	for _, test := range cases(t, "testdata/settings.txt") {
		text, want, _ := strings.Cut(strings.ReplaceAll(test.text, "EUID", strconv.Itoa(os.Geteuid())), "=>\n")
		c := get(parseINI("c.cfg", text))
		_, found := c.settings()
		got := ""
		for _, f := range found {
			got += []string{"remark: ", "mistake: ", ""}[f.grave] + f.String() + "\n"
		}
		equal(t, test.name, got, want)
	}
	c := get(parseINI("c.cfg", "[sensor]\ntimeout = 2h\n[agent]\nallow = 10.0.0.5/8,::ffff:10.1.2.3\n"))
	s, _ := c.settings()
	equal(t, "at most an hour, and IPv4", fmt.Sprint(s.timeout, s.allow), "1h0m0s [10.0.0.0/8 10.1.2.3/32]")
}

// TestLost: each protection that goes away is named, and none that is only another one.
func TestLost(t *testing.T) {
	needsRoot(t) // who alone can have other users
	read := func(text string) *settings {
		s, _ := get(parseINI("", text)).settings()
		return s
	}
	const all = "[sensor]\nuser = 0\nupdate = no\npublic_key = k\n[sensor reach]\nuser = 0\n[sensor x]\nuser = 0\n" +
		"[monitor]\nca = c\n[agent]\nallow = ::1\ncertificate = c\nclient_ca = c\nclient_name = n\n"
	for change, want := range map[string]string{
		"[sensor] user =":       "[sensor] user",
		"[sensor reach] user =": "[sensor reach] user",
		"[sensor y] user =":     "[sensor y] user",
		"[sensor] update = yes": "[sensor] update = no",
		"[sensor] public_key =": "[sensor] public_key",
		"[monitor] ca =":        "[monitor] ca",
		"[agent] allow =":       "[agent] allow",
		"[agent] certificate =": "[agent] certificate",
		"[agent] client_ca =":   "[agent] client_ca",
		"[agent] client_name =": "[agent] client_name",
		"[sensor] public_key = other\n[agent] allow = ::2, ::3": "",
	} {
		s, next := read(all), read(all+strings.ReplaceAll(change, "] ", "]\n"))
		equal(t, change, strings.Join(s.lost(next), ", "), want)
		equal(t, change+", the other way round", len(next.lost(s)), 0)
	}
	equal(t, "lost by an empty client.cfg", len(read(all).lost(read(""))), 10)
}

// TestShippedConfig: client.cfg shows every option with its default, and a document
// explains it. Whoever follows the README sets values in it; those may differ.
func TestShippedConfig(t *testing.T) {
	text := shipped(t, "client.cfg")["client.cfg"]
	document := string(readFile(t, "docs/configuration.md"))
	all := regexp.MustCompile(`(?m)^#([a-z_]+ =)`).ReplaceAllString(text, "$1")
	for name, text := range map[string]string{"as it is": text, "with every default": all} {
		c := get(parseINI("client.cfg", text))
		got, found := c.settings()
		want, _ := (&ini{name: "client.cfg"}).settings()
		equal(t, name, got, want)
		equal(t, name+": findings", len(found), 0)
	}
	for _, o := range known {
		c := get(parseINI("client.cfg", all))
		shown := c.line[c.locate(o.section, o.name)] > 0
		expect(t, shown, "got a client.cfg without [%s] %s; want every option", o.section, o.name)
		has(t, "the document", document, "`"+o.name+"`")
	}
}

// TestEditINI: no change is lost when several are made at once. A link that somebody planted
// at the temporary name is not followed. A change that fails changes nothing.
func TestEditINI(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target.cfg"), filepath.Join(dir, "client.cfg")
	writeTree(t, dir, files{"target.cfg": "[a]\nx = 1\n", "victim": "untouched"})
	plant := func() error { return os.Symlink("victim", nextFile(target)) }
	must(t, errors.Join(os.Symlink("target.cfg", link), plant()))
	edit := func(ctx context.Context, option string) error {
		return editINI(ctx, link, func(c *ini) error { return c.set("a", option, "1") })
	}
	parallel(20, func(i int) {
		err := edit(ctx, fmt.Sprint("y", i))
		expect(t, err == nil, "got %v; want no error", err)
	})
	c := get(readINI(target))
	equal(t, "values", len(c.values), 21)
	lock := lockFile(t, dir)
	within(0, func(ctx context.Context) { has(t, "a lock", edit(ctx, "z"), "another process holds it") })
	must(t, plant())
	err := recoverINI(link)
	expect(t, errors.Is(err, context.DeadlineExceeded), "recover: got %v; want an error that says so, too", err)
	lock.Close()
	expect(t, replaceFile(target, []byte("x")) != nil, "got no error where a link was planted meanwhile; want one")
	must(t, recoverINI(link))
	want := files{"target.cfg": c.text, "victim": "untouched", "client.cfg": c.text}
	equal(t, "the directory", readTree(t, dir), want)
}

// TestCrashConfig kills a process that changes client.cfg again and again, from
// outside and at random moments. The file is whole each time, and the next start
// removes what is left beside it.
func TestCrashConfig(t *testing.T) {
	const zero, one = "[monitor]\nurl = http://0/ ; here\n", "[monitor]\nurl = http://1/ ; here\n"
	if file := os.Getenv("PICKET_TEST_CONFIG"); file != "" { // this process is to be killed
		for i := 0; ; i = 1 - i {
			must(t, editINI(ctx, file, func(c *ini) error { return c.set("monitor", "url", fmt.Sprint("http://", i, "/")) }))
		}
	}
	dir, half := t.TempDir(), 0
	file := filepath.Join(dir, "client.cfg")
	t.Setenv("PICKET_TEST_CONFIG", file)
	for i := 0; i < *kills; i++ {
		writeTree(t, dir, files{"client.cfg": one})
		p := start(t, exec.Command(get(os.Executable()), "-test.run=^TestCrashConfig$"))
		await(t, "first change", func() bool { return string(readFile(t, file)) == zero })
		time.Sleep(time.Duration(mathrand.Int63n(int64(5 * time.Millisecond)))) // any moment will do
		p.Process.Kill()
		p.wait(t)
		if exists(nextFile(file)) {
			half++
		}
		must(t, recoverINI(file))
		got := readTree(t, dir)
		expect(t, len(got) == 1 && slices.Contains([]string{zero, one}, got["client.cfg"]), "got %q; want a whole text", got)
	}
	total("kills of a change of client.cfg", *kills)
	expect(t, half > 0 || *kills < 25, "got none that was killed while it wrote; want some")
}

// TestArguments takes good names of sensors and good arguments; TestBadRequests has the bad ones.
func TestArguments(t *testing.T) {
	longest := strings.Repeat("x", maxName)
	for _, good := range []string{"disk", "a", "CPU load", "ünïcode", "-x", "a.b", "a\\b", longest} {
		equal(t, "the name", get(sensorName(good)), good)
	}
	equal(t, "bytes of a backup's name", len("."+longest+"_2010-03-07T21:24:33"), 255)
	long := strings.Repeat("x", maxArguments-32)
	for _, test := range [][2]any{
		{nil, "[]"}, {"", "[]"}, {[]any{}, "[]"}, {[]any{"used /", "", " x "}, `["used /" "" " x "]`},
		{[]any{7, int64(-5e9), 2.5, true, false, dateTime("20261122T20:43:21"), []byte("abc")},
			`["7" "-5000000000" "2.5" "1" "0" "20261122T20:43:21" "abc"]`},
		{strings.Repeat("'' ", 128), fmt.Sprintf("%q", make([]string, 128))}, {[]any{long}, fmt.Sprintf("[%q]", long)},
	} {
		equal(t, fmt.Sprint(test[0]), fmt.Sprintf("%q", get(arguments(test[0]))), test[1])
	}
}

// TestSplitWords splits the texts of testdata/sensors/words.txt, and others in which the
// shell itself expands nothing: that is compared with.
func TestSplitWords(t *testing.T) {
	for _, c := range cases(t, "testdata/sensors/words.txt") {
		words, err := splitWords(strings.TrimSuffix(c.text, "\n"))
		got := fmt.Sprintf("%q", words)
		if err != nil {
			got = "error"
		}
		equal(t, c.text, got, c.name)
	}
	random := mathrand.New(mathrand.NewSource(1)) // the same each time
	for n, compared := 0, 0; compared < 300; n++ {
		text := ""
		for len(text) < n%8 {
			text += string("ab '\"\\ \t"[random.Intn(8)])
		}
		words, err := splitWords(text)
		if err != nil || len(words) == 0 { // the shell waits for more, or takes set -- without words
			continue
		}
		shell := runTool(t, "", "/bin/sh", "-c", "set -- "+text+"\nprintf '<%s>' \"$@\"")
		equal(t, text, "<"+strings.Join(words, "><")+">", shell)
		compared++
	}
}

// testSensors returns the sensors of a new directory with one sensor, s.
func testSensors(t testing.TB, script string) *sensors {
	dir := t.TempDir()
	writeTree(t, dir, files{"s/check": "#!/bin/sh\n" + script})
	return newSensors(dir, "check", "options", patience)
}

// summaryOf runs a sensor, and returns what the reading says: its code, its value and its reason.
func summaryOf(s *sensors, name string, args ...string) string {
	r := s.read(ctx, name, args, nil)
	if r.value == "" {
		r.value = "nan"
	}
	return strings.TrimSpace(fmt.Sprint(r.code, " ", r.value, " ", r.reason))
}

// TestReading runs the sensors of testdata/sensors/readings.txt. No reading waits for what
// its sensor starts, and what stays in the process group is killed.
func TestReading(t *testing.T) {
	word, tests := mark(t), cases(t, "testdata/sensors/readings.txt")
	parallel(len(tests), func(i int) {
		script, want := tests[i].text, tests[i].name
		s := testSensors(t, script)
		if _, timeout, found := strings.Cut(want, " timed out after "); found {
			s.timeout = get(time.ParseDuration(timeout))
		}
		begun := time.Now()
		equal(t, script, summaryOf(s, "s", "1 2", "*"), want)
		took := time.Since(begun)
		expect(t, took <= patience, "%q: got an end after %v; want at most %v", script, took, patience)
	})
	for _, pid := range marked(word) {
		if group, _ := syscall.Getpgid(pid); group == pid { // it left the group on purpose
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	awaitNone(t, word)
}

// TestReadingQuick: nothing that a sensor writes is lost, whenever it ends, and
// no file is left open.
func TestReadingQuick(t *testing.T) {
	s := testSensors(t, "printf 1; sleep $1; printf 2; echo x >&2; exit 3")
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // which would close files
	open := openFiles(t)
	for i := 0; i < 40; i++ {
		equal(t, fmt.Sprint(i/2, " ms"), summaryOf(s, "s", fmt.Sprintf("0.%03d", i/2)), `3 12 "x"`)
		equal(t, "none", s.read(ctx, "none", nil, nil).code, codeNotFound)
	}
	await(t, "all files are closed", func() bool { return openFiles(t) <= open })
}

// TestReadingStuck: while a process is left that SIGKILL did not end, the
// sensor is not started again.
func TestReadingStuck(t *testing.T) {
	s := testSensors(t, "echo 1")
	p := s.add("s")
	p.stuck = true
	has(t, "beside it", summaryOf(s, "s"), "126 nan …cannot be killed")
	s.remove(p)
	equal(t, "after it", summaryOf(s, "s"), "0 1")
}

// TestProcessLimit: a sensor uses up all processes that the agent's user may
// have. The agent, which needs threads, goes on; sensors start again afterwards.
func TestProcessLimit(t *testing.T) {
	needsRoot(t)
	b := newBox(t, "[sensor]\nconcurrency = 8\ntimeout = 3s\n[monitor]\nspool = spool\n", files{
		"sensors/s/check":      printing(1),
		"sensors/greedy/check": "#!/bin/sh\n(while sleep 30 & do :; done); : >full; exec sleep 30",
	})
	greedy := filepath.Join(b.dir, "sensors/greedy")
	forEverybody(t, greedy)
	uid := strconv.Itoa(50000 + os.Getpid()%10000) // nobody's, nor that of another run of the tests
	runTool(t, "", "chown", uid, b.dir, greedy)
	b.startAs(t, exec.Command(needs(t, "setpriv"), "--reuid="+uid, "--regid="+uid, "--clear-groups",
		needs(t, "prlimit"), "--nproc=60", binary(t), "-c", b.dir+"/client.cfg"))
	mustCall(t, b.client, "cmd_submit_reading", 0, "greedy")
	await(t, "no process is left to start", func() bool { return exists(greedy + "/full") })
	parallel(20, func(i int) {
		for k := 0; k < 5; k++ {
			_, err := b.client.call(ctx, "cmd_submit_reading", 100*k+i+1, "s")
			_, err2 := b.client.call(ctx, "cmd_list_sensors")
			expect(t, err == nil && err2 == nil, "got %v, %v; want no error", err, err2)
		}
	})
	got := getsAll(t, b.recorder, 101)
	equal(t, "the greedy one", got[0], "-15 nan")
	has(t, "those while no process could be made", got, ":126 nan")
	wants(t, b.read(t, 999, "s"), "ticket 999: exit 0, value 1")
}

// TestFitHelps: names come first, then each text has its share, in which the last line says why a change failed.
func TestFitHelps(t *testing.T) {
	for _, count := range []int{2, 300, 2000} {
		texts, failed, last := make(files), make(files), 0
		for i := 0; i < count; i++ {
			name := fmt.Sprint("sensor", i)
			texts[name], failed[name] = strings.Repeat("<é>\n", 500), strings.Repeat(`"é`, i)
		}
		listed := fitHelps(texts, failed)
		size := 0
		for name, text := range listed {
			_, line, _ := strings.Cut(text.(string), "\nlast change failed: ")
			expect(t, encodedLen(line) <= 200 && strings.HasPrefix(failed[name], line), "got %q; want 200 bytes", line)
			size += nameCost + encodedLen(name) + encodedLen(text.(string))
			last += min(len(line), 1)
		}
		expect(t, size <= maxHelps && (last > 150 || count != 300),
			"%d: got %d bytes, %d with a last line, %d listed", count, size, last, len(listed))
	}
}

// smallShells are the shells for which the shipped sensors are made.
var smallShells = []string{"/bin/dash", "/bin/busybox ash"}

// TestShippedSensors asks the shipped sensors what testdata/sensors/shipped says. A line
// "/PATH" of a case begins a file of the box, whose lines are indented with a tab; one that
// ends in a slash is a directory, and "/PATH -> TARGET" is a link. {} stands for the root of
// the box, and /bin holds the tools that not every box has. "? QUESTION = VALUE" and
// "? QUESTION = STATUS: REASON" are what must be answered; … stands for anything.
func TestShippedSensors(t *testing.T) {
	scripts, tables, word := shipped(t, "sensors/"), glob(t, "testdata/sensors/shipped/*.txt"), mark(t)
	equal(t, "sensors with a table", len(tables), len(scripts))
	dash, busybox := needs(t, "/bin/dash"), needs(t, "/bin/busybox")
	tools := map[string]string{dash: t.TempDir(), busybox + " ash": t.TempDir()} // that every box has
	for _, tool := range strings.Fields("awk cat date find grep head ln ls mkdir readlink sed sleep tr") {
		must(t, os.Symlink(needs(t, tool), filepath.Join(tools[dash], tool)))
		must(t, os.Symlink(busybox, filepath.Join(tools[busybox+" ash"], tool)))
	}
	parallel(len(smallShells)*len(tables), func(i int) {
		shell, table := smallShells[i%len(smallShells)], tables[i/len(smallShells)]
		name := strings.TrimSuffix(filepath.Base(table), ".txt")
		for _, c := range cases(t, table) {
			testBox(t, shell, tools[shell], name, scripts["sensors/"+name+"/check"], c)
		}
	})
	awaitNone(t, word)
}

// busyboxTools makes busybox use the tools of a box, and else those that every box has: it
// may prefer its own applets to what is in PATH, but not to a function.
const busyboxTools = `command() { [ -e {root}/bin/$2 ]; }
	tool() { [ -e {root}/bin/$2 ] && file={root}/bin/$2 || file={tools}/$2; eval "$2() { $1 $file \"\$@\"; }"; }
	for name in date df find iw iwinfo sleep stat; do tool '' $name; done
	for name in nc nslookup ping; do tool exec $name; done # which the sensor may kill
`

// testBox makes the files of a case and asks a sensor its questions, with one argument as
// old monitors do or, under dash, with a word in each.
func testBox(t testing.TB, shell, tools, name, script string, c testCase) {
	t.Helper()
	root, s, prelude := t.TempDir(), testSensors(t, ""), "PATH={root}/bin:{tools}\n"
	if shell != "/bin/dash" {
		prelude += busyboxTools
	}
	places := strings.NewReplacer("{root}", root, "{tools}", tools, "/proc/", root+"/proc/", "/sys/", root+"/sys/")
	writeTree(t, s.path, files{name + "/check": "#!" + shell + "\n" + places.Replace(prelude+script)})
	tree, file := make(files), ""
	for _, line := range splitLines(strings.ReplaceAll(c.text, "{}", root)) {
		link, target, isLink := strings.Cut(line, " -> ")
		question, want, _ := strings.Cut(strings.TrimPrefix(line, "? "), " = ")
		switch {
		case strings.HasPrefix(line, "\t"):
			tree[file] += line[1:] + "\n"
		case strings.HasPrefix(line, "? "):
			writeTree(t, root, tree)
			clear(tree)
			args := []string{question}
			if shell == "/bin/dash" {
				args = strings.Fields(question)
			}
			got := strings.ReplaceAll(answerOf(s, name, args...), root, "")
			expect(t, like(got, want), "%s: %s: %s %s: got %s; want %s", shell, c.name, name, question, got, want)
			total("answers of shipped sensors", 1)
		case isLink:
			writeTree(t, root, files{filepath.Dir(link) + "/": ""})
			must(t, os.Symlink(target, root+link))
		default:
			file, tree[line] = line, ""
			if strings.HasPrefix(line, "/bin/") {
				tree[line] = "#!/bin/sh\n"
			}
		}
	}
}

// answerOf asks a shipped sensor, and returns the value or, in its words, "STATUS: REASON".
func answerOf(s *sensors, name string, args ...string) string {
	r := s.read(ctx, name, args, nil)
	if r.code == 0 {
		return r.value
	}
	reason := strings.TrimSuffix(strings.TrimPrefix(r.reason, `"`+name+": "), `"`)
	return fmt.Sprintf("%d%s: %s", r.code, r.value, reason)
}

// TestShippedSensorsHere asks the shipped sensors every question on this machine, and some
// that each must refuse. Their common part is that of the example in docs/sensors.md.
func TestShippedSensorsHere(t *testing.T) {
	scripts := shipped(t, "sensors/")
	_, port, _ := net.SplitHostPort(listen(t, "127.0.0.1:0").Addr().String())
	pidfile := filepath.Join(t.TempDir(), "pid")
	writeTree(t, "", files{pidfile: fmt.Sprintln(os.Getpid())})
	words := strings.NewReplacer("<vol>", "/", "<if>", "lo", "<n>", "0", "<name>", filepath.Base(os.Args[0]),
		"<pidfile>", pidfile, "<file>", pidfile, "<dir>", filepath.Dir(pidfile), "<host>", "127.0.0.1", "<port>", port)
	common := regexp.MustCompile(`(?s)\n# ---- .*\n# ----\n`)
	example := common.FindString(string(readFile(t, "docs/sensors.md")))
	needs(t, "/bin/dash")
	applets := busyboxPath(t, needs(t, "/bin/busybox"))
	for _, shell := range smallShells {
		dir, prelude := t.TempDir(), ""
		if shell != "/bin/dash" {
			prelude = "PATH=" + applets + "\n"
		}
		for _, file := range sortedKeys(scripts) {
			writeTree(t, dir, files{file: "#!" + shell + "\n" + prelude + scripts[file]})
			equal(t, "the common part of "+file, common.FindString(scripts[file]), example)
		}
		s := newSensors(dir+"/sensors", "check", "options", patience)
		helps := get(s.helpTexts(ctx))
		equal(t, "sensors", len(helps), len(scripts))
		for _, name := range sortedKeys(helps) {
			testSensorHere(t, s, shell, name, helps[name], words)
		}
	}
}

func testSensorHere(t *testing.T, s *sensors, shell, name, help string, words *strings.Replacer) {
	missing := regexp.MustCompile("swap_used_pct|temperature|conntrack|wireless|dash reach") // on some boxes
	if os.Geteuid() != 0 {
		missing = regexp.MustCompile(missing.String() + "|reach ping") // busybox's is for root
	}
	lines := splitLines(help)
	parallel(len(lines), func(i int) { // several wait for a second
		question, _, _ := strings.Cut(lines[i], "  ")
		args, want := strings.Fields(words.Replace(question)), "[^:]+"
		if args[0] == "alive" || args[0] == "tcp" {
			want = "1"
		}
		if missing.MatchString(shell + " " + name + " " + args[0]) {
			want += "|1: .*"
		}
		got := answerOf(s, name, args...)
		expect(t, regexp.MustCompile("^("+want+")$").MatchString(got),
			"%s %s %q: got %s; want %s", shell, name, args, got, want)
	})
	for _, question := range []string{
		"", "nonsense", "$(reboot)", "-x", "*", "options more", "a b c", lines[0][:1], "a\nb\x7f", strings.Repeat("x", 8000),
	} {
		got, want := answerOf(s, name, question), "2: …'picket check "+name+" options' lists what can"
		expect(t, like(got, want) && !strings.Contains(got, `\n`), "%s %s: got %s; want %s", shell, question, got, want)
	}
}

// busyboxPath makes a directory with busybox's applets and nothing else.
func busyboxPath(t *testing.T, busybox string) string {
	dir := t.TempDir()
	runTool(t, "", busybox, "--install", "-s", dir)
	return dir
}

// steps makes the steps of each case of a file. A number before a step repeats it, # is
// counted from 0, and what follows two slashes is for the reader.
func steps(t *testing.T, file string, begin func(t *testing.T) (step func(line string))) {
	for _, test := range cases(t, file) {
		t.Run(test.name, func(t *testing.T) {
			step := begin(t)
			for _, line := range splitLines(test.text) {
				line, _, _ = strings.Cut(line, " //")
				times, rest, _ := strings.Cut(line, " ")
				n, err := strconv.Atoi(times)
				if err != nil {
					n, rest = 1, line
				}
				for i := 0; i < n; i++ {
					step(strings.ReplaceAll(rest, "#", strconv.Itoa(i)))
				}
			}
		})
	}
}

// A testQueue's commands wait for the test to end them.
type testQueue struct {
	*testing.T
	*queue
	started   chan command
	end       chan reading
	delivered chan string
	discarded chan any
	outsiders []<-chan error // commands that wait for room
}

// TestQueue makes the steps of testdata/queue.txt.
func TestQueue(t *testing.T) {
	steps(t, "testdata/queue.txt", func(t *testing.T) func(string) {
		q := &testQueue{
			T: t, started: make(chan command, 100), end: make(chan reading),
			delivered: make(chan string, 100), discarded: make(chan any, 100),
		}
		q.queue = newQueue(1, 1, func(ctx context.Context, c command) reading {
			q.started <- c
			select {
			case <-q.end:
				return reading{value: c.sensor}
			case <-ctx.Done():
				return reading{code: -15, value: c.sensor}
			}
		}, func(ticket any, r reading) {
			q.delivered <- strings.TrimSpace(fmt.Sprint(ticket, " ", r.code, " ", r.value))
		}, func(ticket any) { q.discarded <- ticket })
		t.Cleanup(func() { within(0, q.close) })
		return q.step
	})
}

// commandOf reads "TICKET SENSOR" or "TICKET CHANGE:SENSOR", and perhaps "from ADDRESS".
func (q *testQueue) commandOf(words []string) (c command) {
	number, isInt64 := strings.CutPrefix(words[0], "i8:")
	if c.ticket = fromJSON(q.T, "["+number+"]")[0]; isInt64 {
		c.ticket = int64(c.ticket.(int))
	}
	colon := strings.Index(words[1], ":")
	c.change, c.sensor = words[1][:max(colon, 0)], words[1][colon+1:]
	if len(words) == 4 {
		c.from = words[3]
	}
	return c
}

// step makes one step of testdata/queue.txt.
func (q *testQueue) step(line string) {
	q.Helper()
	step, rest, _ := strings.Cut(line, " ")
	words := strings.Fields(rest)
	switch step {
	case "queue", "resize":
		var concurrency, size int
		fmt.Sscan(rest, &concurrency, &size)
		q.resize(concurrency, size)
	case "submit":
		must(q, q.accept(ctx, q.commandOf(words), time.Now().Add(patience)))
	case "wait":
		accepted := make(chan error, 1)
		go func() { accepted <- q.accept(ctx, q.commandOf(words), time.Now().Add(patience)) }()
		q.outsiders = append(q.outsiders, accepted)
		await(q, "it waits for room", func() bool {
			q.mu.Lock()
			defer q.mu.Unlock()
			return len(q.outside) == len(q.outsiders)
		})
	case "full":
		has(q, line, q.accept(ctx, q.commandOf(words), time.Now()), fmt.Sprint("fault ", faultBusy))
	case "room", "closing":
		want := map[string]string{"room": "<nil>", "closing": "shutting down"}[step]
		for _, accepted := range q.outsiders {
			has(q, line, receive(q, "room", accepted), want)
		}
	case "starts", "runs":
		for _, want := range words {
			c := receive(q, "start", q.started)
			got := strings.TrimPrefix(c.change+":"+c.sensor, ":")
			if expect(q, like(got, want), "got %s; want %s to begin", got, want); step == "runs" {
				q.end <- reading{}
			}
		}
	case "end":
		q.end <- reading{}
	case "close", "cancel":
		within(map[string]time.Duration{"close": patience}[step], q.close)
	case "delivers":
		got := strings.Split(rest, ", ")
		for i := range got {
			got[i] = receive(q, "delivery", q.delivered)
		}
		slices.Sort(got)
		equal(q, line, strings.Join(got, ", "), rest)
		equal(q, "more that is delivered", len(q.delivered), 0)
	case "counts":
		equal(q, line, fmt.Sprint(q.count(), len(q.started)), rest)
	case "discards":
		equal(q, line, fmt.Sprint(len(q.discarded)), rest)
	default:
		q.Fatalf("%s: no such step", line)
	}
}

// A stepDelivery makes the steps of testdata/deliveries.txt.
type stepDelivery struct {
	*testing.T
	*delivery
	monitor  *recorder
	lines    fmt.Stringer // the log
	attempts chan bool
	answer   chan string
	ended    chan bool
}

// TestDeliverySteps makes the steps of testdata/deliveries.txt.
func TestDeliverySteps(t *testing.T) {
	steps(t, "testdata/deliveries.txt", func(t *testing.T) func(string) {
		s := &stepDelivery{T: t, lines: logged(t), monitor: newRecorder(t)}
		s.attempts, s.answer, s.ended = make(chan bool, 10000), make(chan string), make(chan bool)
		s.monitor.set(s.hold)
		s.delivery = testDelivery(t, s.monitor, nil)
		return s.step
	})
}

// hold makes an attempt wait for its answer.
func (s *stepDelivery) hold(w http.ResponseWriter, a attempt) bool {
	s.attempts <- true
	what := <-s.answer
	status, err := strconv.Atoi(what)
	switch {
	case what == "ok":
		return false
	case what == "abort":
		panic(http.ErrAbortHandler)
	case what == "hang":
		<-a.context.Done()
	case what == "fault":
		w.Write(encodeResponse(nil, faultf(1, "unknown ticket")))
	case err == nil:
		w.WriteHeader(status)
	default:
		io.WriteString(w, what)
	}
	return true
}

func (s *stepDelivery) step(line string) {
	s.Helper()
	step, rest, _ := strings.Cut(line, " ")
	numbers, value, _ := strings.Cut(rest, " ")
	var first, last int
	if n, _ := fmt.Sscanf(numbers, "%d-%d", &first, &last); n == 1 {
		last = first
	}
	want := make(map[any]string) // readings
	for ticket := first; ticket <= last; ticket++ {
		v := value
		if v == "" {
			v = strconv.Itoa(ticket)
		}
		if want[ticket] = "0 " + v; step == "put" {
			s.put(ticket, reading{value: v})
		}
	}
	switch step {
	case "put":
	case "attempt":
		await(s, "an attempt", func() bool { return len(s.attempts) > 0 })
	case "run":
		go func() {
			for ticket := first; ticket <= last; ticket++ {
				s.waitRoom(ctx)
				s.put(ticket, reading{value: strconv.Itoa(ticket)})
			}
		}()
	case "full":
		await(s, "a run waits for room", func() bool { return locked(s.delivery, s.delivery.full) })
		within(0, s.waitRoom) // returns
		equal(s, line, s.count().undelivered, first)
	case "hangs":
		s.monitor.set(func(_ http.ResponseWriter, a attempt) bool {
			hangs := a.params[0] == any(first)
			if hangs {
				s.attempts <- true
				<-a.context.Done()
			}
			return hangs
		})
		s.configure(newClient(s.monitor.url, time.Second/2, nil), time.UTC, "nan")
	case "answer", "free":
		receive(s, "an attempt", s.attempts)
		if step == "free" {
			s.monitor.set(nil)
		}
		s.answer <- rest
	case "gets":
		equal(s, line, getsAll(s, s.monitor, len(want)), want)
	case "discard":
		s.discard(first)
	case "gone":
		await(s, "nothing is left", func() bool { return s.count().undelivered == 0 })
	case "dropped":
		equal(s, line, int(s.count().dropped), first)
	case "tries":
		equal(s, line, int(s.monitor.tries.Load()), first)
	case "log":
		want := strings.ReplaceAll(rest, "|", "\n") + "\n"
		wantLog(s, s.lines, want)
		equal(s, "lines of "+s.lines.String(), strings.Count(s.lines.String(), "\n"), strings.Count(want, "\n"))
	case "retry":
		locked(s.delivery, func() any { s.retry = get(time.ParseDuration(rest)); return nil })
	case "close", "cancel":
		go func() { within(map[string]time.Duration{"close": patience}[step], s.close); s.ended <- true }()
	case "ended":
		receive(s, "the end", s.ended)
	default:
		s.Fatalf("%s: no such step", line)
	}
}

// testDelivery delivers to a recorder with waits of milliseconds, until the test ends.
func testDelivery(t *testing.T, m *recorder, s *spool) *delivery {
	d := newDelivery(newClient(m.url, patience, nil), time.UTC, "nan", time.Millisecond, s)
	t.Cleanup(func() {
		if !d.closed { // by the test
			within(patience, d.close)
		}
	})
	return d
}

// locked calls f while the delivery is locked, and returns what it returns.
func locked[T any](d *delivery, f func() T) T {
	d.mu.Lock()
	defer d.mu.Unlock()
	return f()
}

// getsAll receives so many readings, and returns their codes and values by ticket.
func getsAll(t testing.TB, m *recorder, n int) map[any]string {
	t.Helper()
	got := make(map[any]string)
	for i := 0; i < n; i++ {
		s := receive(t, "reading", m.readings)
		got[s.ticket] = fmt.Sprint(s.code, " ", s.value)
	}
	return got
}

// TestCorrected: a time is when the reading was taken, also where the clock was set
// since. A suspend does not set it; of another boot nothing is known.
func TestCorrected(t *testing.T) {
	const h = time.Hour
	taken := clocks{time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC), h, "boot"}
	for _, test := range []struct {
		name      string
		wall, age time.Duration // that passed
		boot      string
		want      time.Duration // the correction
	}{
		{"an hour passed, perhaps in suspend", h, h, "boot", 0},
		{"the clock was set", 25 * h, h, "boot", 24 * h},
		{"and set back", -23 * h, h, "boot", -24 * h},
		{"a clock that runs slow was corrected", h + time.Second, h, "boot", 0},
		{"another boot", 25 * h, h, "other", 0},
		{"a container begun anew", 25 * h, -h, "boot", 0},
	} {
		now := clocks{taken.wall.Add(test.wall), taken.age + test.age, test.boot}
		equal(t, test.name, taken.corrected(now).Sub(taken.wall), test.want)
	}
}

// TestClocks compares with what the kernel says in /proc.
func TestClocks(t *testing.T) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Skip(err)
	}
	now, uptime := systemClocks()(), string(readFile(t, "/proc/uptime"))
	up := get(strconv.ParseFloat(strings.Fields(uptime)[0], 64))
	equal(t, "boot", now.boot, string(id[:8]))
	off := now.age.Seconds() - up
	expect(t, off >= -1 && off <= patience.Seconds(), "got an age of %v; want %fs", now.age, up)
}

// puts delivers readings with the tickets from first to last.
func puts(d *delivery, first, last int) {
	for i := first; i <= last; i++ {
		d.put(i, reading{value: strconv.Itoa(i)})
	}
}

// TestDeliveryReason: a reading that waits holds no reason, which may have some KiB.
func TestDeliveryReason(t *testing.T) {
	m := newRecorder(t)
	d := testDelivery(t, m, nil)
	locked(d, func() any { d.retryAt = time.Now().Add(patience); return nil })
	d.put(7, reading{code: 3, reason: strings.Repeat("x", maxReason)})
	equal(t, "what waits", locked(d, func() reading { return d.pending[0].reading }), reading{code: 3})
	d.configure(d.monitor(), time.UTC, "nan") // which sends it
	equal(t, "what arrives", getsAll(t, m, 1), map[any]string{7: "3 nan"})
}

// TestDeliveryWaits: how long a reading waits grows with the failures, but not during
// an outage; after a fault it is longer.
func TestDeliveryWaits(t *testing.T) {
	d := testDelivery(t, newRecorder(t), nil)
	d.retry = time.Second
	p := &pendingReading{} // which d itself never tries
	for n := 1; n <= 3; n++ {
		d.record(p, d.monitor(), io.EOF)
		nearly(t, fmt.Sprint(n, " failures"), time.Until(p.notBefore), time.Second<<(n-1))
		locked(d, func() any { d.answered(time.Now()); return nil })
	}
	d.record(p, d.monitor(), io.EOF)
	d.record(p, d.monitor(), io.EOF)
	nearly(t, "in an outage", time.Until(p.notBefore), 8*time.Second)
	p = &pendingReading{}
	for _, want := range []time.Duration{10 * time.Second, 20 * time.Second} {
		d.record(p, d.monitor(), faultf(1, "locked"))
		nearly(t, "after a fault", time.Until(p.notBefore), want)
	}
	for n := 1; n < 100; n++ {
		for i := 0; i < 100; i++ {
			nearly(t, fmt.Sprint(n), backoff(time.Second, n), min(time.Second<<min(n-1, 20), maxBackoff))
		}
	}
}

// nearly wants a wait to be what it should be ±50 %; a moment of it has passed.
func nearly(t *testing.T, what string, got, want time.Duration) {
	t.Helper()
	expect(t, got >= want/2-time.Second/4 && got <= want*3/2+1, "%s: got %v; want %v ±50 %%", what, got, want)
}

// TestDeliveryFlaps: a monitor that is away again and again does not fill the log.
func TestDeliveryFlaps(t *testing.T) {
	lines, m := logged(t), newRecorder(t)
	d := testDelivery(t, m, nil)
	isAway := func() bool { return locked(d, func() bool { return !d.awaySince.IsZero() }) }
	for i := 1; i <= 30; i++ {
		m.set(away)
		puts(d, i, i)
		await(t, "the monitor is away", isAway)
		m.set(nil)
		await(t, "the monitor is back", func() bool { return !isAway() })
	}
	n := strings.Count(lines.String(), "monitor http")
	expect(t, n >= 20 && n < 40, "got %d lines of 60; want 20 and one each 5 s", n)
}

// TestNetworkFaults: at whatever byte of an exchange with the monitor the connection is
// reset, a reading is tried again until it is stored: once, or twice where the answer was
// lost. An update or a move has been made or has changed nothing, and its ticket says which.
func TestNetworkFaults(t *testing.T) {
	b := newBox(t, "[sensor]\nbackup = backup\n", files{
		"packages/demo.tar.bz2": demoPackage(t, 2), "sensors/demo/check": printing(1),
	})
	carry, resets := new(atomic.Int64), new(atomic.Int64)
	proxy := faultyProxy(t, b.url.Host, carry, resets)
	b.configure(t, strings.Replace(b.config, b.url.Host, proxy, 1))
	b.next = "http://" + proxy + "/RPC2"
	log := logged(t)
	a := b.run(t)
	wantLog(t, log, ": answers")
	retryFast(a)
	state := func() string {
		return fmt.Sprint(readTree(t, b.dir+"/sensors"), string(readFile(t, b.dir+"/client.cfg")))
	}
	failed, twice, ticket := 0, 0, 10000 // tickets are equally long
	survives := func(step int, method string, params func(ticket int) []any) (after string) {
		before, code := state(), 1
		for n := 0; code != 0 || step == 1 && resets.Load() > 0; n += step { // a reading never fails
			a.delivery.monitor().close() // so that it comes on a connection that fails
			carry.Store(int64(n))
			resets.Store(0)
			ticket++
			mustCall(t, b.client, method, params(ticket)...)
			stored := 0
			for ; stored == 0 || len(b.readings) > 0; stored++ { // again where the answer was lost
				got := receive(t, "the outcome", b.readings)
				await(t, "it is known to be stored", func() bool { return a.delivery.count().undelivered == 0 })
				equal(t, "ticket", got.ticket, any(ticket))
				code = got.code
			}
			where := fmt.Sprintf("%s, reset after %d bytes", method, n)
			expect(t, stored <= 2, "%s: got it stored %d times", where, stored)
			if code != 0 {
				equal(t, where, state(), before)
			}
			failed, twice = failed+1, twice+stored-1
		}
		return state()
	}
	survives(1, "cmd_submit_reading", func(ticket int) []any { return []any{ticket, "demo"} })
	expect(t, 0 < twice && twice < failed/2, "got %d stored twice of %d; want those whose answer was lost", twice, failed)
	before := survives(101, "cmd_update_sensor_code", func(ticket int) []any { return []any{"demo", ticket} })
	has(t, "the new version", before, "demo/check:"+printing(2))
	after := survives(11, "cmd_register_new_server", func(ticket int) []any { return []any{ticket} })
	equal(t, "the new monitor", after, strings.Replace(before, "/xmlrpc/", "/RPC2", 1))
	leavesNothing(t, b.dir)
	total("network faults survived", failed)
}

// faultyProxy passes connections on to a host. The next one carries as many bytes, either
// way, as carry says, and all further ones carry all. resets counts those that could not.
func faultyProxy(t *testing.T, host string, carry, resets *atomic.Int64) (address string) {
	const all = 1 << 30
	carry.Store(all)
	return listenRaw(t, "127.0.0.1:0", func(agent net.Conn) {
		var left atomic.Int64
		left.Store(carry.Swap(all))
		monitor := dial(t, host, "")
		pass := func(to, from net.Conn) {
			buffer, err := make([]byte, 4096), error(nil)
			for n := 0; err == nil && left.Load() > 0; {
				n, err = from.Read(buffer)
				n = min(n, int(left.Load()))
				left.Add(int64(-n))
				to.Write(buffer[:n])
			}
			if left.Load() == 0 {
				resets.Add(1)
			}
			agent.(*net.TCPConn).SetLinger(0)
			agent.Close()
			monitor.Close()
		}
		go pass(monitor, agent)
		pass(agent, monitor)
	}).Addr().String()
}

// retryFast makes an agent deliver with waits of milliseconds.
func retryFast(a *agent) {
	locked(a.delivery, func() any { a.delivery.retry = time.Millisecond; return nil })
}

// spoolText returns what is in the file of a spool, "" where there is none.
func spoolText(t testing.TB, dir string) string {
	text, _ := os.ReadFile(filepath.Join(dir, spoolFile)) // it may be missing
	return string(text)
}

// parseSpool reads the text of a spool.
func parseSpool(t testing.TB, text string) ([]*pendingReading, *spool) {
	t.Helper()
	s := &spool{}
	return get(s.read(strings.NewReader(text))), s
}

// spooled reads what a spool holds undelivered, as ticket=value.
func spooled(t *testing.T, dir string) (list []string) {
	t.Helper()
	found, _ := parseSpool(t, spoolText(t, dir))
	for _, p := range found {
		list = append(list, fmt.Sprintf("%v=%s", p.ticket, p.value))
	}
	return list
}

// awaitSpooled waits until a spool holds so many readings. Without one its file is empty.
func awaitSpooled(t *testing.T, dir string, n int) {
	t.Helper()
	await(t, plural(n, "reading")+" on the disk", func() bool {
		isEmpty := exists(filepath.Join(dir, spoolFile)) && spoolText(t, dir) == ""
		return len(spooled(t, dir)) == n && (n > 0 || isEmpty)
	})
}

// pendingOf is a reading in a spool that was taken at some moment.
func pendingOf(number uint64, ticket any, r reading, at clocks) *pendingReading {
	return &pendingReading{reading: r, ticket: ticket, taken: at, record: number}
}

// TestSpoolDamage: any byte of a spool that is flipped, and any end that is
// missing, costs one reading.
func TestSpoolDamage(t *testing.T) {
	text, now := "", systemClocks()()
	for i := 1; i <= 4; i++ {
		text += readingRecord(pendingOf(uint64(i), i, reading{value: "1"}, now), now)
	}
	read := func(text string) []int { // left, damaged, and the last number
		found, s := parseSpool(t, text)
		equal(t, "the size", s.size, len(text))
		return []int{len(found), s.damaged, int(s.last)}
	}
	equal(t, "whole", read(text), []int{4, 0, 4})
	equal(t, "with marks", read(text+markRecord(2)+markRecord(9)), []int{3, 0, 9})
	for i := range text {
		least, whole := 3, strings.Count(text[:i], "\n")
		if text[i] == '\n' { // two lines become one; or the end alone is missing
			least, whole = 2, whole+1
		}
		for _, flip := range []byte{1, 0x80} {
			b := []byte(text)
			b[i] ^= flip
			got := read(string(b))
			expect(t, got[0] >= least && got[0] <= 3 && got[1] > 0, "byte %d: got %v; want 3 left, 1 damaged", i, got)
		}
		equal(t, fmt.Sprintf("cut at %d: left", i), read(text[:i])[0], whole)
		torn := read(text[:i] + "\n" + text) // written on after a torn record
		equal(t, fmt.Sprintf("torn at %d: left", i), torn[0], whole+4)
	}
	rubbish := strings.Repeat("x", 100000) + "\n" + strings.Repeat("\x00", 5000) + "\n"
	pieces := 100000/maxRecord + 2 // one that is too long comes in pieces
	equal(t, "rubbish", read(rubbish+text), []int{4, pieces, 4})
}

// TestSpoolClock: when the clock is set, the file is written anew with the right times,
// as the power may go. They are what is sent.
func TestSpoolClock(t *testing.T) {
	birth := clocks{time.Unix(300, 0), 5 * time.Minute, "aaaaaaaa"}
	set := clocks{time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC), 65 * time.Minute, "aaaaaaaa"}
	m, dir := newRecorder(t), t.TempDir()
	m.set(away)
	d := testDelivery(t, m, newSpool(dir, 1<<20))
	var now atomic.Pointer[clocks]
	now.Store(&birth)
	locked(d, func() any { d.clocks = func() clocks { return *now.Load() }; return nil })
	puts(d, 1, 1)
	awaitSpooled(t, dir, 1)
	now.Store(&set)
	await(t, "the time is right", func() bool {
		found, _ := parseSpool(t, spoolText(t, dir))
		return len(found) == 1 && found[0].taken.wall.Sub(set.wall.Add(-time.Hour)).Abs() < time.Minute
	})
	before := m.tries.Load()
	await(t, "an attempt that began after that", func() bool { return m.tries.Load() >= before+2 })
	m.set(nil)
	at := get(time.Parse(dateTimeLayout, string(receive(t, "reading", m.readings).time)))
	expect(t, at.Sub(set.wall.Add(-time.Hour)).Abs() < time.Minute, "got the time %v; want about 11:00", at)
}

// TestSpoolFull: the file stays within its limit. The oldest readings are dropped, and
// counted.
func TestSpoolFull(t *testing.T) {
	lines, m, dir := logged(t), newRecorder(t), t.TempDir()
	const limit, n = 64 << 10, 3000
	m.set(away)
	d := testDelivery(t, m, newSpool(dir, limit))
	for i := 0; i < n; i += 100 {
		puts(d, i, i+99)
		await(t, "it is written", func() bool { return locked(d, func() bool { return d.inMemory == 0 }) })
		size := len(spoolText(t, dir))
		expect(t, size <= limit, "got %d bytes; want at most %d", size, limit)
	}
	within(0, d.close)
	left, totals := spooled(t, dir), d.count()
	equal(t, "on the disk", len(left), totals.undelivered)
	equal(t, "dropped and undelivered", int(totals.dropped)+totals.undelivered, n)
	expect(t, len(left) >= limit/200 && slices.Contains(left, "2999=2999"),
		"got %d on the disk, %q; want many, and the last", len(left), left)
	has(t, "the log", lines, "reading dropped: the oldest of what the spool holds")
}

// TestSpoolBroken: a spool that cannot be written is logged once. Readings are kept in
// memory, and written when it works again. One that cannot be opened is not used. What
// version 1 left in the spool is delivered, too: readings of all types, marks, records of the
// clock and a last line that was cut off by a power cut.
func TestSpoolBroken(t *testing.T) {
	lines, m, dir := logged(t), newRecorder(t), filepath.Join(t.TempDir(), "spool")
	old := string(readFile(t, "testdata/spool/old"))
	found, s := parseSpool(t, old)
	equal(t, "readings, damaged, last", []int{len(found), s.damaged, int(s.last)}, []int{5, 1, 7})
	equal(t, "time", found[0].taken.wall.UnixMilli(), int64(1795654616904))
	m.set(away)
	next := filepath.Join(dir, spoolNext)
	writeTree(t, dir, files{spoolFile: old, spoolNext + "/": ""}) // in its way
	d := testDelivery(t, m, newSpool(dir, 1<<20))
	puts(d, 11, 13)
	wantLog(t, lines, spoolNext+": …; undelivered readings are in memory alone")
	equal(t, "the file", spoolText(t, dir), old)
	must(t, os.Remove(next))
	locked(d, func() any { d.spool.retryAt = time.Now(); d.changed.Broadcast(); return nil }) // a minute later
	awaitSpooled(t, dir, 8)
	wantLog(t, lines, "works again")
	equal(t, "times logged", strings.Count(lines.String(), "in memory alone"), 1)
	other := testDelivery(t, m, newSpool(dir, 1<<20))
	wantLog(t, lines, "spool "+dir+"/readings: not used: another process uses it; undelivered readings are in memory")
	m.set(nil)
	puts(other, 14, 14)
	equal(t, "the readings", getsAll(t, m, 9), map[any]string{
		1: "0 0.42", int64(1) << 40: "-15 nan", "a \"b\"\né": "0 -1e6", 6: "65 nan", 5: "0 62.5",
		11: "0 11", 12: "0 12", 13: "0 13", 14: "0 14",
	})
	awaitSpooled(t, dir, 0)
}

// TestSpoolEnd: a start removes what a power cut left beside the spool, and the end tells how
// many readings are nowhere on the disk.
func TestSpoolEnd(t *testing.T) {
	lines, m, dir := logged(t), newRecorder(t), filepath.Join(t.TempDir(), "spool")
	next := filepath.Join(dir, spoolNext)
	writeTree(t, dir, files{spoolNext: "1d3f6a02 r 17"})
	m.set(away)
	d := testDelivery(t, m, newSpool(dir, 1<<20))
	equal(t, "the next file is there", exists(next), false)
	puts(d, 1, 2)
	awaitSpooled(t, dir, 2)
	must(t, os.Mkdir(next, 0o700)) // in its way
	locked(d, func() any { return d.spool.f.Close() })
	puts(d, 3, 5)
	wantLog(t, lines, "spool …; undelivered readings are in memory alone")
	within(patience, d.close)
	wantLog(t, lines, ": 5 readings not delivered, 3 of them in memory alone")
}

// TestSpoolPrivate: a spool is used only where nobody but its user and root can change
// its directory or the path to it. Nothing elsewhere is touched.
func TestSpoolPrivate(t *testing.T) {
	needsRoot(t)
	for _, test := range []struct{ name, want string }{
		{"own/deep/spool", "<nil>"},
		{"link/spool", "<nil>"}, // root's
		{"sticky/own", "<nil>"}, // as in /tmp
		{"sticky/others", "sticky/others belongs to another user"},
		{"sticky", "sticky can be changed by other users"},
		{"open/spool", "open can be changed by other users"},
		{"others/spool", "others belongs to another user"},
		{"way/spool", "way belongs to another user"}, // a link
		{"loop/spool", "too many links"},
		{"file", "readings: not a directory"},
		{"file/spool", "spool: not a directory"},
	} {
		home := t.TempDir()
		runTool(t, home, "sh", "-e", "-c", `mkdir -p own open others sticky/own sticky/others; : >file
			ln -s own link; ln -s own way; ln -s loop loop; chown -h 65534 way others sticky/others
			chmod 775 open; chmod 1777 sticky`)
		before := describeTree(t, home)
		s := newSpool(filepath.Join(home, test.name), 1<<20)
		_, err := s.open()
		s.close()
		has(t, test.name, err, test.want)
		if err != nil {
			equal(t, test.name, describeTree(t, home), before)
		}
	}
}

// TestLocalZone compares with what date shows.
func TestLocalZone(t *testing.T) {
	zones := []string{
		"", "UTC", "CET-1CEST,M3.5.0,M10.5.0/3", "<-03>3", "EST5EDT,M3.2.0,M11.1.0", "AEST-10AEDT,M10.1.0,M4.1.0/3",
		":UTC0", "IST-5:30", "<+1245>-12:45<+1345>,M9.5.0/2:45,M4.1.0/3:45",
	}
	const zoneinfo = "/usr/share/zoneinfo/"
	if exists(zoneinfo + "Europe/Berlin") {
		zones = append(zones, zoneinfo+"Europe/Berlin", zoneinfo+"America/New_York", "America/New_York")
	}
	for _, tz := range zones {
		t.Setenv("TZ", tz)
		zone := localZone(tz, true, "")
		for _, at := range []int64{0, 1700000000, 1780000000, 1793498399, 1793498401} {
			want := runTool(t, "", "date", "-d", fmt.Sprint("@", at), "+%Y%m%dT%H:%M:%S")
			equal(t, fmt.Sprintf("TZ=%s at %d", tz, at), time.Unix(at, 0).In(zone).Format(dateTimeLayout)+"\n", want)
		}
	}
	for _, bad := range []string{"nonsense/zone", "\n", "CET-1CEST,M13.5.0"} {
		zone, err := posixZone(bad)
		expect(t, err != nil, "%q: got %v; want an error", bad, zone)
	}
	etc := t.TempDir()
	hour := func(what, tz string, set bool, want int) { // at noon UTC
		noon := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
		equal(t, what, noon.In(localZone(tz, set, etc)).Hour(), want)
	}
	hour("no zone anywhere", "", false, 12)
	writeTree(t, etc, files{"TZ": "CET-1CEST,M3.5.0,M10.5.0/3\n"})
	hour("/etc/TZ", "", false, 14)
	if data, err := os.ReadFile(zoneinfo + "America/New_York"); err == nil {
		writeTree(t, etc, files{"localtime": string(data)})
		hour("/etc/localtime comes before it", "", false, 8)
	}
	hour("TZ=", "", true, 12)
	hour("/dev/zero, which has no end", "/dev/zero", true, 12)
}

func TestDecodeCall(t *testing.T) {
	for _, file := range glob(t, "testdata/xml/*.xml") {
		method, params, err := decodeCall(readFile(t, file))
		expect(t, err == nil, "%s: got %v; want no error", file, err)
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
	equal(t, "the response", get(decodeResponse(message)), any(value))
	_, err := decodeResponse(encodeResponse(nil, faultf(7, "no\nway")))
	equal(t, "the fault", err, error(&fault{7, "no way"}))
}

// notation is what stands in braces in testdata: a byte or several, {\x00}, and
// what is repeated, {x*65536}.
var notation = regexp.MustCompile(`\{(\\[^{}*]*)\}|\{([^{}]*)\*(\d+)\}`)

// expand returns a text of testdata without its notation.
func expand(text string) string {
	call := string(encodeCall("healthcheck"))
	text = strings.NewReplacer("{call}", call, "{message}", message("m", "<param><value/></param>")).Replace(text)
	return notation.ReplaceAllStringFunc(text, func(braces string) string {
		part := notation.FindStringSubmatch(braces)
		plain := get(strconv.Unquote(`"` + strings.ReplaceAll(part[1]+part[2], `"`, `\"`) + `"`))
		n := 1
		if part[3] != "" {
			n, _ = strconv.Atoi(part[3])
		}
		return strings.Repeat(plain, n)
	})
}

// message returns a call of a method. No agent has the method m.
func message(method, params string) string {
	return "<methodCall><methodName>" + method + "</methodName><params>" + params + "</params></methodCall>"
}

// httpText returns a text of testdata as HTTP, with its lines' ends.
func httpText(text string) string {
	if !strings.HasSuffix(text, "\n\n") {
		text = strings.TrimSuffix(text, "\n")
	}
	return strings.ReplaceAll(text, "\n", "\r\n")
}

// exchange sends bytes, and nothing after them, and returns what is answered:
// for each response its status or, with 200, what is in it.
func exchange(t *testing.T, host, request string) string {
	t.Helper()
	conn := dial(t, host, "")
	sent := make(chan struct{})
	go func() { // a refusal may come before the end
		defer close(sent)
		io.WriteString(conn, request)
		conn.CloseWrite()
	}()
	defer func() { conn.Close(); <-sent }()
	method, _, _ := strings.Cut(request, " ")
	var got []string
	for r := bufio.NewReader(conn); ; {
		resp, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil && len(got) == 0 {
			return "nothing"
		} else if err != nil {
			return strings.Join(got, " ")
		}
		body, _ := io.ReadAll(resp.Body) // it may end in a reset
		if resp.StatusCode == http.StatusOK {
			got = append(got, verdict(decodeResponse(body)))
		} else {
			got = append(got, fmt.Sprint(resp.StatusCode))
		}
	}
}

// verdict is the code of a fault, or those in the results of a multicall, or
// the result, or another error.
func verdict(v any, err error) string {
	if f := (*fault)(nil); errors.As(err, &f) {
		return fmt.Sprint(f.code)
	} else if err != nil {
		return err.Error()
	}
	results, _ := v.([]any)
	for i, result := range results {
		if f, ok := result.(map[string]any); ok {
			results[i] = f["faultCode"]
		}
	}
	return fmt.Sprint(v)
}

// posted returns the request with a body.
func posted(body string) string {
	return fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// TestHTTP sends the requests of testdata/http.txt; TestBadRequests has what is
// refused.
func TestHTTP(t *testing.T) {
	h := newHandler([]method{
		{"healthcheck", "string", "OK.", healthcheck},
		{"defect", "string", "", func(request, []any) (any, error) { panic("defect") }},
		{"error", "string", "", func(request, []any) (any, error) { return nil, errors.New("inside") }},
	})
	h.setAccess(&access{allow: get(networks("127.0.0.1"))})
	u := serve(t, h)
	methods := strings.NewReplacer("{defect}", string(encodeCall("defect")), "{error}", string(encodeCall("error")))
	for _, c := range cases(t, "testdata/http.txt") {
		want, from, _ := strings.Cut(c.name, " from ")
		conn := dial(t, u.Host, from)
		io.WriteString(conn, methods.Replace(expand(httpText(c.text))))
		answer := get(io.ReadAll(conn))
		expect(t, like(string(answer), want+"…"), "%s: got %q; want %s", c.text, answer, want)
	}
	equal(t, "refused", h.count.Load(), int64(3))
}

// postedCall returns the request of a method with the values of its parameters,
// split by " | ".
func postedCall(call string) string {
	method, params, some := strings.Cut(call, " | ")
	if some {
		params = strings.ReplaceAll(params, " | ", "</value></param><param><value>")
		params = "<param><value>" + params + "</value></param>"
	}
	return posted(message(method, params))
}

// TestBadRequests: whatever is sent to an agent, the answer says what is wrong
// with it, and afterwards the agent is as it was.
func TestBadRequests(t *testing.T) {
	lines := logged(t)
	b := newBox(t, "", files{"sensors/s/check": "#!/bin/sh\nsleep 0.2; echo 1\n"})
	a := b.run(t)
	settled := func() int { // without connections
		b.client.close()
		a.delivery.monitor().close()
		await(t, "no connections", func() bool {
			stacks := make([]byte, 1<<20)
			stacks = stacks[:runtime.Stack(stacks, true)]
			return !regexp.MustCompile(`net/http\.\(\*(conn|persistConn)\)`).Match(stacks)
		})
		return runtime.NumGoroutine()
	}
	heap := func() uint64 {
		var stats runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&stats)
		return stats.HeapAlloc
	}
	b.read(t, 1, "s")
	health := func() string { // but for what goes on
		what := regexp.MustCompile(` (uptime|delivered|refused|rss_kb|last_delivery_age) \d+`)
		return what.ReplaceAllString(a.healthLine(), "")
	}
	goroutines, bytesBefore, healthBefore := settled(), heap(), health()

	n := 0
	for _, c := range cases(t, "testdata/requests.txt") {
		space := strings.LastIndex(c.name, " ")
		want, kind, lines := c.name[:space], requestKinds[c.name[space+1:]], splitLines(c.text)
		if c.name[space+1:] == "request" {
			lines = []string{httpText(c.text)}
		}
		for _, line := range lines {
			for _, text := range kind.texts {
				request := kind.request(expand(strings.Replace(text, "%s", line, 1)))
				equal(t, fmt.Sprintf("%.200q", request), exchange(t, b.client.url.Host, request), want)
				n++
			}
		}
	}

	equal(t, "healthcheck", mustCall(t, b.client, "healthcheck"), any("OK"))
	wants(t, b.read(t, 2, "s"), "ticket 2: exit 0, value 1")
	// A caller that has closed its sending side, as nc -N does, still gets an answer that takes a while.
	has(t, "the list", exchange(t, b.client.url.Host, postedCall("cmd_list_sensors")), "s:1")
	equal(t, "more readings", len(b.readings), 0)
	expect(t, !strings.Contains(lines.String(), "defect"), "got %s; want no defect", lines)
	await(t, "the goroutines are back", func() bool { return settled() <= goroutines })
	equal(t, "health", health(), healthBefore)
	bytesAfter := heap()
	expect(t, bytesAfter <= bytesBefore+8<<20, "heap: got %d bytes; want %d", bytesAfter, bytesBefore)
	total("bad requests refused", n)
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
	"param":     {posted, []string{message("m", "<param>%s</param>")}},
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

// TestConnToClose: a caller who comes when all connections are taken gets one, unless he
// holds the most. A call that waits does not give way to an idle connection.
func TestConnToClose(t *testing.T) {
	var apart []string // hosts, none of which holds more than another
	for i := 1; i <= maxConns; i++ {
		apart = append(apart, fmt.Sprint("10.0.1.", i))
	}
	stranger := append([]string{"192.168.0.1"}, apart[1:]...)
	four := []string{"10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"}
	for _, test := range []struct {
		name    string
		hosts   []string // of 64 connections, in turn
		working int      // so many of them are
		comes   string
		gives   string // whose connection gives way
	}{
		{"a hog with one address", four[:1], maxConns, "10.0.0.9", `10\.0\.0\.2`},
		{"a hog with four", four, maxConns, "10.0.0.9", `10\.0\.0\.[2-5]`},
		{"a neighbour", []string{"2001:db8::bad"}, maxConns, "2001:db8::1", `2001:db8::bad`},
		{"idle ones", four[:2], 0, "10.0.0.9", `10\.0\.0\.[23]`},
		{"himself", []string{"10.0.0.9"}, maxConns, "10.0.0.9", `10\.0\.0\.9`},
		{"one that may not call", stranger, maxConns, "10.0.0.9", `192\.168\.0\.1`},
		{"the idle one", apart, maxConns - 1, "10.0.0.9", `10\.0\.1\.64`},
		{"the longest idle one", apart, 0, "10.0.0.9", `10\.0\.1\.1`},
		{"the latest call", apart, maxConns, "10.0.0.9", `10\.0\.1\.64`},
	} {
		h := newHandler(nil)
		h.setAccess(&access{allow: get(networks("10.0.0.0/8, 2001:db8::/32"))})
		admit := func(host string) net.Conn {
			c, other := net.Pipe()
			t.Cleanup(func() { c.Close(); other.Close() })
			return h.admit(addressed{c, &net.TCPAddr{IP: net.ParseIP(host), Port: 1}})
		}
		for i := 0; i < maxConns; i++ {
			p := h.conns[admit(test.hosts[i%len(test.hosts)])]
			p.working, p.since = i < test.working, time.Unix(int64(i), 0)
		}
		before := maps.Clone(h.conns)
		admit(test.comes)
		var gave []string
		for c, p := range before {
			if h.conns[c] == nil {
				gave = append(gave, p.host)
				_, err := c.Write([]byte("x"))
				equal(t, test.name+": it is closed", err, io.ErrClosedPipe)
			}
		}
		got := fmt.Sprint(gave, h.count.Load())
		expect(t, regexp.MustCompile(`^\[`+test.gives+`\] 1$`).MatchString(got),
			"%s: got %s; want %s, one", test.name, got, test.gives)
	}
}

// An addressed connection comes from that address.
type addressed struct {
	net.Conn
	remote net.Addr
}

func (a addressed) RemoteAddr() net.Addr { return a.remote }

// TestLargeAnswers: an answer has 64 KiB at most, that of a multicall too; only a package
// may have more.
func TestLargeAnswers(t *testing.T) {
	lines := logged(t)
	answer := func(v any) func(request, []any) (any, error) {
		return func(request, []any) (any, error) { return v, nil }
	}
	c := testClient(t, serve(t, newHandler([]method{
		{"quarter", "string", "", answer(strings.Repeat("&", maxMessage/20))},
		{"whole", "string", "", answer(strings.Repeat("x", maxMessage-118))},
		{"more", "string", "", answer(strings.Repeat("x", maxMessage-117))},
		{"package", "base64", "", answer(make([]byte, maxMessage))},
	})), nil)
	call := map[string]any{"methodName": "quarter", "params": []any{}}
	mustCall(t, c, "whole")
	mustCall(t, c, "package")
	equal(t, "answers", len(mustCall(t, c, "system.multicall", []any{call, call, call}).([]any)), 3)
	tooLarge := fmt.Sprint(faultRequest)
	equal(t, "more", verdict(c.call(ctx, "more")), tooLarge)
	equal(t, "four answers", verdict(c.call(ctx, "system.multicall", []any{call, call, call, call})), tooLarge)
	has(t, "the log", lines, `127.0.0.1: "more": fault -32600: the answer has more than 65536 bytes`)
}

// TestFewFiles: callers that hold connections do not use up the files of a process that
// may have few.
func TestFewFiles(t *testing.T) {
	b := newBox(t, "", files{"sensors/s/check": printing(1)})
	b.startAs(t, wrapped(self(t, b.dir), "sh", "-c", `ulimit -n 48; exec "$@"`, "sh"))
	for i := 0; i < 3*maxConns; i++ {
		dial(t, b.client.url.Host, "")
	}
	for i := 0; i < 10; i++ {
		wants(t, b.read(t, i, "s"), fmt.Sprintf("ticket %d: exit 0, value 1", i))
	}
}

func TestIntrospection(t *testing.T) {
	h := newHandler([]method{{"m", "string int, string", "help", healthcheck}})
	for _, c := range cases(t, "testdata/introspection.txt") {
		method, params, _ := strings.Cut(c.name, " ")
		v, err := h.call(request{}, method, fromJSON(t, params))
		got := fmt.Sprintf("%v %v\n", v, err)
		expect(t, like(got, c.text), "%s: got %s; want %s", c.name, got, c.text)
	}
}

// open counts the connections of a handler.
func (h *handler) open() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.conns)
}

// TestClientKeepsConnection: a burst goes over one connection, over TLS, too. It does
// not stay open for long: it might be the only one that the monitor can serve.
func TestClientKeepsConnection(t *testing.T) {
	pair := newCA(t, "ca").valid(t, "monitor")
	for scheme, rules := range map[string]*tls.Config{"http": nil, "https": serverTLS(pair)} {
		h := newHandler([]method{{"healthcheck", "string", "OK.", healthcheck}})
		h.setAccess(&access{tls: rules})
		u := serve(t, h)
		u.Scheme = scheme
		c := testClient(t, u, clientTLS(pair))
		usual := *c.idleTimeout()
		*c.idleTimeout() = patience
		conns := make(map[net.Conn]*peer)
		for i := 0; i < 20; i++ {
			mustCall(t, c, "healthcheck")
			h.mu.Lock()
			maps.Copy(conns, h.conns)
			h.mu.Unlock()
		}
		equal(t, scheme+": connections", len(conns), 1)
		c.close()
		*c.idleTimeout() = usual
		mustCall(t, c, "healthcheck")
		await(t, "the connection is closed", func() bool { return h.open() == 0 })
	}
}

// TestAnswers: what is a methodResponse, and what is none.
func TestAnswers(t *testing.T) {
	for _, c := range cases(t, "testdata/answers.txt") {
		want, ok := strings.CutSuffix(c.name, " message")
		if !ok {
			continue
		}
		for _, line := range splitLines(c.text) {
			v, err := decodeResponse([]byte(expand(line)))
			got := fmt.Sprintf("%#v", v)
			if f := (*fault)(nil); errors.As(err, &f) {
				got = err.Error()
			} else if err != nil {
				got = "none"
			}
			equal(t, line, got, want)
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
			var conns atomic.Int32
			l := listenRaw(t, "127.0.0.1:0", func(conn net.Conn) {
				conns.Add(1)
				r := bufio.NewReader(conn)
				for _, answer := range strings.Split(c.text, "...\n") {
					if answer == "close\n" {
						return
					}
					request, err := http.ReadRequest(r)
					if err != nil || answer == "" {
						return
					}
					user, password, _ := request.BasicAuth()
					head := fmt.Sprint(user, " ", password, " ", request.Header.Get("Content-Type"), " ", len(request.Header))
					equal(t, "the head", head, "user secret text/xml 4")
					expect(t, request.ContentLength > 0, "got %d bytes of body; want some", request.ContentLength)
					io.Copy(io.Discard, request.Body)
					io.WriteString(conn, bodies.Replace(expand(httpText(answer))))
				}
				io.Copy(io.Discard, r) // until the client hangs up
			})
			u := &url.URL{Scheme: "http", User: url.UserPassword("user", "secret"), Host: l.Addr().String()}
			client := testClient(t, u, nil)
			*client.idleTimeout() = patience
			if parts[3] == "half a header" {
				client.timeout = time.Second / 2
			}
			for _, want := range strings.Split(parts[1], " then ") {
				got := verdict(client.call(ctx, "m"))
				expect(t, regexp.MustCompile("^"+want+"$").MatchString(got) && !strings.Contains(got, "secret"),
					"got %s; want %s", got, want)
			}
			equal(t, "connections", fmt.Sprint(conns.Load()), parts[2])
		})
	}
	equal(t, "requests elsewhere", elsewhere.tries.Load(), int64(0))
}

// TestClientCancelled: a call that was cancelled before it began is not sent; one that
// was cancelled when all had come has its answer.
func TestClientCancelled(t *testing.T) {
	m := newRecorder(t)
	c := testClient(t, m.url, nil)
	*c.idleTimeout() = patience
	mustCall(t, c, "healthcheck")
	before, cancel := context.WithCancel(ctx)
	cancel()
	for i := 0; i < 20; i++ {
		_, err := c.call(before, "cmd_store_probe_data", i, []any{0, "1"}, dateTime("20261122T20:43:21"))
		equal(t, "cancelled before", errors.Is(err, context.Canceled), true)
	}
	after, cancel := context.WithCancel(ctx)
	must(t, c.post(after, "healthcheck", nil, func(body io.Reader) error {
		_, err := io.ReadAll(body)
		cancel()
		return err
	}))
	meanwhile, cancel := context.WithCancel(ctx)
	m.set(func(_ http.ResponseWriter, a attempt) bool { cancel(); <-a.context.Done(); return true })
	_, err := c.call(meanwhile, "cmd_get_new_monitor_url")
	equal(t, "cancelled while it waits", errors.Is(err, context.Canceled), true)
	m.set(nil)
	mustCall(t, c, "healthcheck")
	equal(t, "sent", len(m.readings), 0)
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
		"http://monitor:/a%20b?c=d e&%20":      "monitor:80 monitor /a%20b?c=d%20e&%20",
		"http://[fe80::1%25eth0]:8081/xmlrpc/": "[fe80::1%eth0]:8081 [fe80::1]:8081 /xmlrpc/",
	} {
		c := testClient(t, get(httpURL(text)), nil)
		c.http.Transport.(*http.Transport).DialContext = func(_ context.Context, _, address string) (net.Conn, error) {
			got = address
			return net.Dial("tcp", u.Host)
		}
		mustCall(t, c, "healthcheck")
		equal(t, text, got, want)
	}
}

// TestClientAddresses: of a name with several addresses the one that answered last
// is tried first, and one that is dead leaves time for the others.
func TestClientAddresses(t *testing.T) {
	port, dead := deadAddress(t)
	c := newClient(&url.URL{Scheme: "http", Host: fmt.Sprint("monitor:", port)}, time.Second, nil)
	c.lookup = func(context.Context, string) ([]string, error) { return []string{"127.0.0.2", "127.0.0.3"}, nil }
	var silent atomic.Bool // whether 127.0.0.2 leaves its callers waiting
	serveAt := func(host string) *http.Server {
		answer := func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			if silent.Load() && host == "127.0.0.2" {
				<-r.Context().Done()
			}
			w.Write(encodeResponse(host, nil))
		}
		_, server := serveOn(t, fmt.Sprint(host, ":", port), http.HandlerFunc(answer))
		return server
	}
	want := func(what, want string) {
		t.Helper()
		got := verdict(c.call(ctx, "m"))
		c.close()
		expect(t, like(got, want), "%s: got %s; want %s", what, got, want)
	}
	second := serveAt("127.0.0.3")
	want("the first is dead", "127.0.0.3")
	dead.Close()
	first := serveAt("127.0.0.2")
	want("the second answered last", "127.0.0.3")
	second.Close()
	want("the second is gone", "127.0.0.2")
	second = serveAt("127.0.0.3")
	want("the first answered last", "127.0.0.2")
	silent.Store(true)
	want("the first is silent", "no answer in 1s")
	want("the first was silent", "127.0.0.3")
	silent.Store(false)
	first.Close()
	second.Close()
	want("both are gone", "…refused")
}

// deadAddress returns a port at which nobody answers a SYN to 127.0.0.2, until the
// listener there is closed: its queue is full.
func deadAddress(t *testing.T) (port int, dead net.Listener) {
	t.Helper()
	dead = listen(t, "127.0.0.2:0")
	raw := get(dead.(*net.TCPListener).SyscallConn())
	must(t, raw.Control(func(fd uintptr) { syscall.Listen(int(fd), 0) })) // from now on it has room for one
	for i := 0; i < 4; i++ {
		net.DialTimeout("tcp", dead.Addr().String(), time.Second/20)
	}
	return dead.Addr().(*net.TCPAddr).Port, dead
}

// TestManyCallers: whatever 60 callers send or leave unread, an agent in 16 MiB
// goes on, from its first moment, and answers others within ten seconds.
func TestManyCallers(t *testing.T) {
	call := func(method, params string) string { // one of a multicall
		return "<value><struct><member><name>methodName</name><value>" + method + "</value></member><member>" +
			"<name>params</name><value><array><data>" + params + "</data></array></value></member></struct></value>"
	}
	capabilities := call("system.getCapabilities", "")
	submitted := call("cmd_submit_reading", "<value><int>####</int></value><value>s</value>")
	const multicall, submit = "system.multicall | <array><data>", "cmd_submit_reading | <int>####</int> | s | "
	for _, c := range []struct {
		name  string
		queue int
		times int    // that each caller sends his request
		reads int    // answers that he reads
		kind  string // of requestKinds
		text  string // in which #### is another ticket each time
	}{
		{"slow senders", 4, 1, 0, "request", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 65536\r\n\r\n{ *65535}"},
		{"unread answers", 4, 5, 0, "call", multicall + strings.Repeat(capabilities, 45) + "</data></array>"},
		{"many attributes", 4, 4, 4, "body", "<methodCall {a='' *13000}><methodName>m</methodName></methodCall>"},
		{"many values", 4, 4, 4, "call", "m | <array><data>{<value>ab</value>*1900}</data></array>"},
		{"calls that wait", 4, 1, 0, "call", multicall + strings.Repeat(capabilities, 25) + submitted +
			call("m", "{<value>ab</value>*1500}") + "</data></array>"},
		{"a queue full of empty arguments", 256, 2, 2, "call", submit + "{'' *512}"},
		{"too many arguments, as words", 256, 5, 5, "call", submit + "{'' *8192}"},
		{"too many arguments, as an array", 256, 5, 5, "call", submit + "<array><data>{<value/>*4090}</data></array>"},
	} {
		t.Run(c.name, func(t *testing.T) {
			more := fmt.Sprintf("queue = %d\nverbose = yes\n[sensor]\ntimeout = 100\nconcurrency = 1\n", c.queue)
			b := newBox(t, more, files{"sensors/s/check": "#!/bin/sh\nexec sleep 100\n"})
			p, limited := b.startTiny(t)
			if !limited {
				t.Skip("no memory cgroup on this machine, or no right to make one")
			}
			sent := crowd(t, b.client.url.Host, requestKinds[c.kind].request(expand(c.text)), c.times, c.reads)
			healthy := func() {
				c := newClient(b.client.url, 10*time.Second, nil)
				defer c.close()
				equal(t, "healthcheck", mustCall(t, c, "healthcheck"), any("OK"))
			}
			for i := 0; i < 20; i++ {
				healthy()
			}
			for i := 0; i < cap(sent); i++ {
				<-sent
			}
			if c.name == "calls that wait" {
				wantLog(t, &p.log, strings.Repeat("command cmd_submit_reading…", 60))
			}
			healthy()
		})
	}
}

// TestTinyAnswers: whatever a monitor answers, an agent in 16 MiB goes on.
func TestTinyAnswers(t *testing.T) {
	for name, value := range map[string]string{
		"attributes": "<value {a='' *100000}/>", "a few attributes": "<value { *400000}{a='' *8000}/>",
		"words": "<value {a *260000}>", "text": "<value>{x*520000}</value>", "elements": "<value><{a><*170000}",
	} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t, "", files{"sensors/s/check": printing(1)})
			b.set(func(w http.ResponseWriter, _ attempt) bool {
				io.WriteString(w, expand("<methodResponse><params><param>"+value+"</param></params></methodResponse>"))
				return true
			})
			p, limited := b.startTiny(t)
			if !limited {
				t.Skip("no memory cgroup on this machine, or no right to make one")
			}
			mustCall(t, b.client, "cmd_update_sensor_code", "demo")
			wantLog(t, &p.log, "update demo: fetch: …")
			mustCall(t, b.client, "cmd_submit_reading", 1, "s")
			await(t, "an attempt", func() bool { return b.tries.Load() > 1 })
			p.terminate(t)
		})
	}
}

// crowd has 60 callers send a request so many times, with another ticket in the place of
// #### each time, and read so many answers. Each reports when he is done.
func crowd(t *testing.T, host, request string, times, reads int) (sent chan struct{}) {
	sent = make(chan struct{}, 60)
	go parallel(cap(sent), func(i int) {
		defer func() { sent <- struct{}{} }()
		conn := dial(t, host, fmt.Sprint("127.0.1.", i+1))
		conn.SetReadBuffer(4 << 10)
		r := bufio.NewReader(conn)
		for n := 0; n < times; n++ {
			io.WriteString(conn, strings.ReplaceAll(request, "####", strconv.Itoa(1000+times*i+n)))
		}
		if times > 1 {
			r.Peek(1) // the first answer begins
		}
		for n := 0; n < reads; n++ {
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Error(err)
				return
			}
			io.Copy(io.Discard, resp.Body)
		}
	})
	return sent
}

// TestAccess: who may call, by address.
func TestAccess(t *testing.T) {
	allow := get(networks("192.168.1.7/24, 10.0.0.5,fd00::/8, ::ffff:172.16.0.0/108, 2001:db8::1"))
	a := &access{allow: allow}
	for want, hosts := range map[bool][]string{
		true:  {"192.168.1.1", "::ffff:192.168.1.9", "10.0.0.5", "fd12::1", "172.16.3.4", "2001:db8::1"},
		false: {"192.168.2.1", "10.0.0.6", "fe80::1%eth0", "172.32.0.1", "2001:db8::2", ""},
	} {
		for _, host := range hosts {
			equal(t, host, a.allows(host), want)
		}
	}
	for _, bad := range []string{
		"x", "1.2.3.4/33", "1.2.3.4,,5.6.7.8", ",", "host.example", "fe80::1%eth0", "::ffff:1.2.3.4/90",
	} {
		got, err := networks(bad)
		expect(t, err != nil, "%q: got %v; want an error", bad, got)
	}
	equal(t, "keys", limitKey("::ffff:1.2.3.4")+" "+limitKey("2001:db8::1:2:3:4"), "1.2.3.4 2001:db8::/64")
}

// TestHog: a caller who opens connections all the time, with calls that wait, does not
// keep others out, and holds no more than 64.
func TestHog(t *testing.T) {
	var waiting atomic.Int64
	h := newHandler([]method{
		{"healthcheck", "string", "OK.", healthcheck},
		{"wait", "string", "", func(r request, _ []any) (any, error) {
			waiting.Add(1)
			defer waiting.Add(-1)
			<-r.ctx.Done()
			return "OK", nil
		}},
	})
	u := serve(t, h)
	hog := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	var over atomic.Bool
	parallel(2, func(i int) {
		if i == 0 {
			defer over.Store(true)
			for n := 0; n < 100; n++ {
				c := newClient(u, patience, nil) // a fresh connection for each
				_, err := c.call(ctx, "healthcheck")
				expect(t, err == nil, "got %v; want no error", err)
				c.close()
			}
			return
		}
		for n := 0; n < 2000 && !over.Load(); n++ {
			conn, err := hog.Dial("tcp", u.Host)
			if err != nil {
				break
			}
			t.Cleanup(func() { conn.Close() })
			io.WriteString(conn, [3]string{postedCall("wait"), "POST / HTTP/1.1\r\nHost: x\r\nX-", ""}[n%3])
		}
	})
	await(t, "no more than the limit", func() bool { return h.open() <= maxConns })
	await(t, "no more calls than connections", func() bool { return waiting.Load() <= maxConns })
}

func TestLogLimit(t *testing.T) {
	lines := logged(t)
	l := logLimit{burst: 3, perSecond: 1}
	for i := 0; i < 10; i++ {
		l.printf("line %d", i)
	}
	l.last = l.last.Add(-2 * time.Second)
	l.printf("later")
	equal(t, "the log", lines.String(), "line 0\nline 1\nline 2\n7 lines left out\nlater\n")
}

// TestFetch decodes base64 while it arrives.
func TestFetch(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 20001)
	text := base64.StdEncoding.EncodeToString(data)
	lines := regexp.MustCompile(".{76}").ReplaceAllString(text, "$0\r\n")
	packages := strings.NewReplacer("{text}", text, "{lines}", lines, "{100}", text[:100])
	var answer string
	c := testClient(t, serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, answer)
	})), nil)
	for _, test := range cases(t, "testdata/answers.txt") {
		want, ok := strings.CutSuffix(test.name, " package")
		if !ok {
			continue
		}
		for _, line := range splitLines(test.text) {
			answer = packages.Replace(expand(line))
			if !strings.Contains(line, "<?xml") && !strings.Contains(line, "<methodResponse>") {
				answer = xmlDeclaration + "\n<methodResponse>\n<params><param><value>" + answer +
					"</value></param></params></methodResponse>"
			}
			var got bytes.Buffer
			err := c.fetch(ctx, &got, 1<<20, "m")
			outcome := fmt.Sprint(err)
			if err == nil && bytes.Equal(got.Bytes(), data) {
				outcome = "ok"
			}
			expect(t, regexp.MustCompile("^"+want+"$").MatchString(outcome),
				"%.100q: got %d bytes, %v; want %s", line, got.Len(), err, want)
		}
	}
	c = newClient(serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, "<methodResponse>")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})), 200*time.Millisecond, nil)
	equal(t, "half an answer", fmt.Sprint(c.fetch(ctx, io.Discard, 1<<20, "m")), "nothing has come for 200ms")
}

// plainInstall installs a package of demo.
func (u *updater) plainInstall(from source) error { return u.install(ctx, "demo", from) }

// entriesOf reads one line of testdata/packages.txt or upgrade.txt.
func entriesOf(line string) (entries []packed) {
	fields := regexp.MustCompile(`"(\\.|[^"\\])*"|\S+`).FindAllString(line, -1)
	e, repeat := packed{Header: tar.Header{Name: fields[0]}, raw: make(map[int]string)}, 1
	if strings.HasPrefix(fields[0], `"`) {
		e.Name = get(strconv.Unquote(fields[0]))
	}
	for _, field := range fields[1:] {
		switch key, value, _ := strings.Cut(field, "="); key {
		case "type":
			e.Typeflag = value[0]
		case "to":
			e.Linkname = value
		case "raw":
			var at int
			var bytes string
			get(fmt.Sscanf(value, "%d:%x", &at, &bytes))
			e.raw[at] = bytes
		case "repeat":
			repeat = get(strconv.Atoi(value))
		default:
			if field[0] == '"' {
				e.body = get(strconv.Unquote(field))
			} else {
				e.Mode = get(strconv.ParseInt(field, 8, 32))
			}
		}
	}
	for i := 0; i < repeat; i++ {
		next := e
		next.Name = strings.ReplaceAll(e.Name, "#", strconv.Itoa(i))
		entries = append(entries, next)
	}
	return entries
}

// A packageCase is a case of testdata/packages.txt or installs.txt.
type packageCase struct {
	name, want    string
	archive       string
	limit         int64
	before, after files
}

func packageCases(t testing.TB, from string) (list []packageCase) {
	t.Helper()
	for _, test := range cases(t, from) {
		p := packageCase{name: test.name, want: "<nil>", limit: 2 << 20, before: make(files), after: make(files)}
		var entries []packed
		then, cutTo := "", int64(-1)
		for _, line := range splitLines(expand(test.text)) {
			key, value, _ := strings.Cut(line, " ")
			name, text, _ := strings.Cut(value, " ")
			switch key {
			case "want":
				p.want = value
				p.before["sensors/demo/check"], p.before["sensors/demo/version"] = printing(0), "1.2.3.0\n"
				p.before["backup/demo_TIME/check"], p.after = "x", p.before
			case "file":
				p.archive = string(readFile(t, "testdata/packages/"+value))
			case "then":
				then = get(strconv.Unquote(value))
			case "cut":
				cutTo = get(strconv.ParseInt(value, 10, 64))
			case "limit":
				p.limit = get(strconv.ParseInt(value, 10, 64))
			case "before":
				p.before[name] = get(strconv.Unquote(text))
			case "after":
				p.after[name] = get(strconv.Unquote(text))
			default:
				entries = append(entries, entriesOf(line)...)
			}
		}
		if p.archive == "" {
			p.archive = packageOf(t, entries...)
		}
		if cutTo >= 0 {
			p.archive = p.archive[:cutTo]
		}
		p.archive += then
		list = append(list, p)
	}
	return list
}

// TestInstall installs the packages of testdata/installs.txt and refuses those of packages.txt:
// whatever is wrong with a package, nothing changes.
func TestInstall(t *testing.T) {
	for _, test := range append(packageCases(t, "testdata/installs.txt"), packageCases(t, "testdata/packages.txt")...) {
		dir := t.TempDir()
		u := testUpdater(t, dir, test.before)
		u.maxUnpacked = test.limit
		err := u.plainInstall(fromText(test.archive, ""))
		expect(t, regexp.MustCompile("^(?s:"+test.want+")$").MatchString(fmt.Sprint(err)),
			"%s: got %v; want %s", test.name, err, test.want)
		equal(t, test.name, readTree(t, dir), test.after)
		if err == nil {
			equal(t, test.name, u.sensors.read(ctx, "demo", nil, nil).code, 0)
		} else {
			leavesNothing(t, test.name, u.dirs()...)
			total("hostile packages refused", 1)
		}
	}
}

// dirs are the directories in which an updater may leave something.
func (u *updater) dirs() []string { return []string{u.sensors.path, u.backup} }

// removeGone removes what changes may leave: the versions that they replaced.
func (u *updater) removeGone(t testing.TB) {
	t.Helper()
	for _, file := range get(filepath.Glob(u.at(gonePrefix + "*"))) {
		must(t, os.RemoveAll(file))
	}
}

// TestInstallLocked: while another process holds the lock of the backups, changes fail
// and all else goes on. Other users cannot take that lock; those they can take do no harm.
func TestInstallLocked(t *testing.T) {
	u := testUpdater(t, t.TempDir(), files{"sensors/demo/check": printing(1)})
	lockFile(t, u.sensors.path)
	must(t, u.plainInstall(demo(t, 2)))
	equal(t, "the mode of the backups", get(os.Stat(u.backup)).Mode().Perm(), fs.FileMode(0o700))
	held := lockFile(t, u.backup)
	equal(t, "sensors listed", len(get(u.sensors.helpTexts(ctx))), 1)
	equal(t, "a reading", u.sensors.read(ctx, "none", nil, nil).code, codeNotFound)
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	has(t, "a change", u.rollback(short, "demo"), "another process is changing the sensors")
	must(t, u.recover(ctx))
	held.Close()
	must(t, os.RemoveAll(u.backup))
	must(t, os.Symlink("sensors", u.backup))
	has(t, "a link to the sensors", u.rollback(ctx, "demo"), "the same directory")
	for _, mode := range []fs.FileMode{0o775, 0o777} {
		must(t, os.Chmod(filepath.Dir(u.backup), mode))
		want := map[bool]string{true: "not a directory", false: "the same directory"}[os.Geteuid() == 0]
		has(t, "a link that others may have made", u.rollback(ctx, "demo"), want)
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

// plant does what the owner of a directory of sensors can do to lead root elsewhere: it
// exchanges a file or directory for a link or a pipe, and back, many times.
func plant(random *mathrand.Rand, dir, elsewhere string) {
	pick := func(names []string) string { return names[random.Intn(len(names))] }
	names := []string{".picket-lock", ".picket-swap-demo", ".picket-gone-demo", ".picket-old-demo", "demo"}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	os.MkdirAll(filepath.Join(dir, "demo/lib"), 0o755) // something to exchange
	outer, name := pick(names), pick([]string{"", "lib", "check", "version", "lib/data", "demo", "demo/lib"})
	if random.Intn(2) == 0 {
		outer, name = "demo", "lib"
	}
	file := filepath.Join(dir, outer, name)
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

// otherUsersBox returns an updater that runs as root, with sensors (and more files) of
// another user, and a directory that only root can read.
func otherUsersBox(t *testing.T, more ...string) (u *updater, elsewhere string) {
	t.Helper()
	needsRoot(t)
	dir := t.TempDir()
	forEverybody(t, dir)
	tree := files{"sensors/demo/check": printing(1), "sensors/demo/lib/data": "1"}
	u = testUpdater(t, filepath.Join(dir, "box"), tree)
	if !slices.Contains(more, "backup") {
		os.Remove(u.backup)
	}
	for _, file := range append(append(more, "sensors", "sensors/demo", "sensors/demo/lib"), sortedKeys(tree)...) {
		must(t, os.Chown(filepath.Join(dir, "box", file), otherUID, otherUID))
	}
	elsewhere = filepath.Join(dir, "elsewhere")
	writeTree(t, elsewhere, files{"check": "secret", "version": "99", "lib/data": "secret"})
	runTool(t, "", "chmod", "-R", "700", elsewhere)
	return u, elsewhere
}

// TestHostile: whatever the owner of the directory of sensors plants and
// exchanges there, root reads, writes, gives away and removes nothing elsewhere.
func TestHostile(t *testing.T) {
	for _, his := range [][]string{{}, {"backup"}, {".", "backup"}} {
		u, elsewhere := otherUsersBox(t, his...)
		before := describeTree(t, elsewhere)
		var over atomic.Bool
		var turn sync.Mutex // the exchanges pause while the test looks: it would wait for a pipe
		done := asUser(t, otherUID, func() {
			for random := mathrand.New(mathrand.NewSource(1)); !over.Load(); {
				turn.Lock()
				plant(random, u.sensors.path, elsewhere)
				if random.Intn(4) == 0 {
					plant(random, u.backup, elsewhere)
				}
				turn.Unlock()
			}
		})
		from := demo(t, 2, entry("demo/lib/data", "2"))
		for i := 0; i < 20; i++ { // each may fail
			u.plainInstall(from)
			u.rollback(ctx, "demo")
			u.recover(ctx)
			turn.Lock()
			tree := describeTree(t, filepath.Dir(u.backup))
			turn.Unlock()
			expect(t, !strings.Contains(tree, "secret"), "%q: got a secret in %s; want none", his, tree)
			total("changes while their directories were exchanged", 3)
		}
		over.Store(true)
		receive(t, "the end of the exchanges", done)
		equal(t, fmt.Sprint(his), describeTree(t, elsewhere), before)
	}
}

// TestDir: an open directory is the same one wherever it is moved, and nothing
// that is done in it follows a link or waits for a pipe. It knows how much fits.
func TestDir(t *testing.T) {
	top := t.TempDir()
	path := func(name string) string { return filepath.Join(top, name) }
	writeTree(t, top, files{"d/": "", "elsewhere/file": "x", "elsewhere/lib/file": "x"})
	f := get(os.Open(path("d")))
	defer f.Close()
	d := dir{File: f}
	must(t, d.enoughSpace(1))
	has(t, "an exbibyte", d.enoughSpace(1<<60), "no space: ")
	before := describeTree(t, path("elsewhere"))
	must(t, errors.Join(os.Rename(path("d"), path("moved")), os.Symlink(path("elsewhere"), path("d"))))
	inner := get(d.mkdir("inner", 0o755))
	defer inner.Close()
	must(t, inner.write("new", strings.NewReader("y"), 0o644, nil))
	must(t, errors.Join(os.Symlink(path("elsewhere/file"), path("moved/inner/file")),
		os.Symlink(path("elsewhere/lib"), path("moved/inner/lib")), syscall.Mkfifo(path("moved/inner/pipe"), 0o600)))
	for _, name := range []string{"file", "lib", "pipe"} {
		opened, err := inner.open(name, 0)
		expect(t, name == "pipe" || err != nil, "got %s; want no link followed", name)
		opened.Close()
	}
	must(t, d.remove("inner"))
	equal(t, "inner exists", exists(path("moved/inner")), false)
	equal(t, "elsewhere", describeTree(t, path("elsewhere")), before)
}

// TestOwner: what root installs among another user's sensors is his, so that
// his agent can change it, whatever he had planted there. A trial runs with his
// rights, and they are not enough to change the package.
func TestOwner(t *testing.T) {
	u, elsewhere := otherUsersBox(t)
	before := describeTree(t, elsewhere)
	links := files{".picket-lock": "check", ".picket-staging": "", ".picket-swap-x": "", "y": "new"}
	for name, to := range links {
		must(t, os.Symlink(filepath.Join(elsewhere, to), u.at(name)))
	}
	u.sensors.user = sensorUser{credential: &syscall.Credential{Uid: otherUID, Gid: otherUID}}
	tried := "#!/bin/sh\n[ $(id -u) = 1234 ] || exit 8\n" +
		"{ echo >new || echo >>check || mv lib new; } 2>/dev/null && exit 9\necho 2\n"
	for _, name := range []string{"demo", "x", "y"} {
		archive := packageOf(t, entry(name+"/check", tried), entry(name+"/lib/data", ""))
		must(t, u.install(ctx, name, fromText(archive, "")))
	}
	equal(t, "elsewhere", describeTree(t, elsewhere), before)
	u.removeGone(t)
	leavesNothing(t, "installed", u.dirs()...)
	his := describeTree(t, u.sensors.path) + describeTree(t, u.backup)
	his = regexp.MustCompile(`.* L.*\n`).ReplaceAllString(his, "") // links are nobody's
	equal(t, "files of root", regexp.MustCompile(`(?m)^\S+ \S+ 0 `).FindAllString(his, -1), []string(nil))
	u.sensors.user = sensorUser{}
	receive(t, "his own changes", asUser(t, otherUID, func() {
		err := errors.Join(u.plainInstall(demo(t, 3)), u.rollback(ctx, "demo"))
		expect(t, err == nil, "got %v; want no error", err)
	}))
	equal(t, "the warning", u.ownerWarning(), "")

	// As tar left it where a user had packed it, and the backups are root's.
	must(t, os.Chown(u.backup, 0, 0))
	has(t, "the warning", u.ownerWarning(), "chown -R 0:0 "+u.sensors.path)
	must(t, errors.Join(u.plainInstall(demo(t, 4)), u.rollback(ctx, "demo")))
}

// TestVerify takes or refuses the signatures of testdata/signatures.txt.
func TestVerify(t *testing.T) {
	dir := t.TempDir()
	archive := demoPackage(t, 1)
	public, sign := signify(t, "keynum_1")
	public2, sign2 := signify(t, "keynum_2")
	_, impostor := signify(t, "keynum_1")
	_, stranger := signify(t, "keynum_3")
	writeTree(t, dir, files{
		"keys/a.pub": public, "keys/b.pub": public2, "keys/README": "no key", "bad/a.pub": "rubbish", "none/": "",
		"edited/a.pub": strings.ReplaceAll(public, "\n", "\r\n"), "edited/b.pub": public2 + " \r\n\n",
		"edited/._a.pub": "\x00\x05\x16\x07", "edited/.b.pub": "", "hidden/._a.pub": public,
		"two.pub": public + public2, "gap.pub": strings.Replace(public, "\n", "\n\n", 1),
	})
	good := strings.TrimSuffix(sign(archive), "\n")
	_, line, _ := strings.Cut(good, "\n")
	texts := strings.NewReplacer("{good}", good, "{second}\n", sign2(archive), "{stranger}\n", stranger(archive),
		"{impostor}\n", impostor(archive), "{other}\n", sign(archive[1:]), "{public}\n", public, "{line}", line,
		"{short}", line[4:], "{RS}", base64.StdEncoding.EncodeToString([]byte("RS"+strings.Repeat("x", 72))),
		`\r`, "\r", "{end}\n", "", "{much}", strings.Repeat("x", maxKeyFile))
	for _, c := range cases(t, "testdata/signatures.txt") {
		where, want, _ := strings.Cut(c.name, ": ")
		keys, sensor, _ := strings.Cut(where, " ")
		u := testUpdater(t, dir, nil)
		u.keys = filepath.Join(dir, keys)
		got := fmt.Sprint(u.install(ctx, sensor, fromText(archive, texts.Replace(c.text))))
		expect(t, like(got, want), "%s: got %s; want %s", c.text, got, want)
	}
}

// TestVerifyFlipped flips each bit of a signature and of a key behind the
// comment, which is not trusted, and one in each byte of a package. A pipe in the place
// of one of them is an error at once.
func TestVerifyFlipped(t *testing.T) {
	dir := t.TempDir()
	archive := packageOf(t, entry("demo/check", printing(1)))
	public, sign := signify(t, "keynum_1")
	good := files{"demo": archive, "demo.sig": sign(archive), "key": public}
	c := &change{updater: testUpdater(t, dir, nil), ctx: ctx, from: fromFile(filepath.Join(dir, "demo"))}
	c.keys = filepath.Join(dir, "key")
	for what, text := range good {
		writeTree(t, dir, good)
		c.archive = get(os.Open(filepath.Join(dir, "demo")))
		must(t, c.verify())
		first, step := 8*(strings.Index(text, "\n")+1), 1
		if what == "demo" {
			first, step = 0, 9
		}
		for i := first; i < 8*(len(text)-1); i += step {
			bad := []byte(text)
			bad[i/8] ^= 1 << (i % 8)
			writeTree(t, dir, files{what: string(bad)})
			expect(t, c.verify() != nil, "bit %d of %s flipped: got no error; want one", i, what)
			total("flipped bits refused by verification", 1)
		}
		c.archive.Close()
		file := filepath.Join(dir, what)
		must(t, errors.Join(os.Remove(file), syscall.Mkfifo(file, 0o600)))
		has(t, what, c.plainInstall(c.from), what+": not a regular file")
		must(t, os.Remove(file))
	}
}

// demoBackups lists the backups of demo, oldest first.
func (u *updater) demoBackups() []string {
	return get(filepath.Glob(filepath.Join(u.backup, "demo_*")))
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
	before := func(backups ...int) files { // versions, oldest first
		tree := files{"sensors/demo/check": printing(1), "sensors/demo/lib/data": "1"}
		for i, version := range backups {
			dir := fmt.Sprintf("backup/demo_2026-01-0%dT00:00:00/", i+1)
			tree[dir+"check"], tree[dir+"lib/data"] = printing(version), strconv.Itoa(version)
		}
		return tree
	}
	install := func(u *updater) error { return u.plainInstall(demo(t, 2, entry("demo/lib/data", "2"))) }
	rollback := func(u *updater) error { return u.rollback(ctx, "demo") }
	return []crash{
		{"update", before(), install, []string{"1", "2"}, false},
		{"deploy", files{}, install, []string{"", "2"}, false},
		{"rollback", before(2), rollback, []string{"1", "2"}, false},
		{"overlay", before(), install, []string{"1", "2"}, true},
		{"prune", before(1, 1, 1), install, []string{"1", "2"}, false},
	}
}

// updater returns an updater before the change, with its backups in a
// directory of other unless that is "".
func (c crash) updater(t testing.TB, other string) *updater {
	t.Helper()
	u := testUpdater(t, t.TempDir(), c.before)
	if other != "" {
		u.backup = testUpdater(t, get(os.MkdirTemp(other, "")), c.before).backup
	}
	return u
}

// watch calls step before each change of the file system, with its number.
func (c crash) watch(u *updater, step func(what string, n int) error) (steps *int) {
	steps = new(int)
	lower := c.overlay // until it is removed, demo is in the lower layer
	u.step = func(what string) error {
		*steps++
		err := step(what, *steps)
		if err == nil && what == "remove "+u.at("demo") {
			lower = false
		}
		if err == nil && lower && what == "rename "+u.at("demo") {
			err = syscall.EXDEV
		}
		return err
	}
	return steps
}

// healthy lets every step succeed.
func healthy(string, int) error { return nil }

var errDead = errors.New("dead")

// deadAt makes every step from the n-th on fail. A removal that is stopped has
// removed something already.
func (c crash) deadAt(u *updater, n int) (steps *int) {
	return c.watch(u, func(what string, step int) error {
		if step < n {
			return nil
		}
		if dir, ok := strings.CutPrefix(what, "remove "); ok && step == n {
			os.Remove(filepath.Join(dir, "check"))
			os.Remove(filepath.Join(dir, "demo", "check"))
		}
		return errDead
	})
}

// intact checks what the agent finds after a start: versions that are whole,
// none of those before the change is lost, and nothing else is left.
func (c crash) intact(t *testing.T, u *updater, where string, outcome ...string) {
	t.Helper()
	leavesNothing(t, where, u.dirs()...)
	version := func(dir string) string { // of a complete sensor
		tree := readTree(t, dir)
		n := tree["lib/data"]
		equal(t, where+": "+dir, tree, files{"check": "#!/bin/sh\necho " + n + "\n", "lib/data": n})
		return n
	}
	got := ""
	if exists(u.at("demo")) {
		got = version(u.at("demo"))
	}
	expect(t, slices.Contains(outcome, got), "%s: got %q; want one of %q", where, got, outcome)
	kept := map[string]bool{got: true}
	backups := u.demoBackups()
	for _, backup := range backups {
		kept[version(backup)] = true
	}
	for name, text := range c.before {
		expect(t, !strings.HasSuffix(name, "/data") || kept[text],
			"%s: got versions %v; want %s kept, too", where, kept, text)
	}
	expect(t, len(backups) <= u.keep+2, "%s: got %d backups; want %d, and two more before the next change at most",
		where, len(backups), u.keep)
}

// recovered stops the recovery dead at each of its steps, recovers again, and returns how
// often it did so. setUp makes the state before.
func (c crash) recovered(t *testing.T, where string, setUp func() *updater) (points int) {
	t.Helper()
	for m := 1; ; m++ {
		u := setUp()
		steps := c.deadAt(u, m)
		where := fmt.Sprintf("%s, recovery step %d", where, m)
		err := u.recover(ctx)
		expect(t, err == nil || errors.Is(err, errDead), "%s: %v", where, err)
		last := *steps < m
		c.watch(u, healthy)
		must(t, u.recover(ctx))
		c.intact(t, u, where, c.outcome...)
		if last {
			return m
		}
	}
}

// TestCrash stops every change dead at each of its steps, then recovery at
// each of its own, and looks at what the next start makes of it.
func TestCrash(t *testing.T) {
	others := fileSystems(t)
	if len(others) == 1 {
		defer t.Skip("no second file system on this machine")
	}
	for _, c := range crashes(t) {
		for _, other := range others {
			u := c.updater(t, other)
			steps := c.watch(u, healthy)
			must(t, c.run(u))
			u.removeGone(t)
			c.intact(t, u, c.name, c.outcome[1])
			for n := 1; n <= *steps; n++ {
				total("points at which a change was stopped dead", 1)
				where := fmt.Sprintf("%s, backups in %q, step %d of %d", c.name, other, n, *steps)
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

// fileSystems returns "" for that of temporary directories and, where there is another, a
// new directory that renaming cannot reach from those.
func fileSystems(t *testing.T) []string {
	for _, parent := range []string{"/dev/shm", "/run", "/var/tmp"} {
		dir, err := os.MkdirTemp(parent, "picket-test-")
		if err != nil {
			continue
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		if ownerOf(get(os.Stat(dir))).Dev != ownerOf(get(os.Stat(t.TempDir()))).Dev {
			return []string{"", dir}
		}
	}
	return []string{""}
}

// TestUpgrade recovers what an older version left when it was interrupted.
func TestUpgrade(t *testing.T) {
	states := cases(t, "testdata/upgrade.txt")
	expect(t, len(states) >= 100, "got %d states; want 100 or more", len(states))
	list := crashes(t)
	for _, state := range states {
		kind, _, _ := strings.Cut(state.name, ",")
		c := list[slices.IndexFunc(list, func(c crash) bool { return c.name == kind })]
		for _, remove := range []bool{false, true} { // the directory of backups, where it is empty
			if remove && strings.Contains(state.text, "backup/") {
				continue
			}
			total("times an older version's change was recovered", c.recovered(t, state.name, func() *updater {
				dir := t.TempDir()
				u := testUpdater(t, dir, nil)
				for _, line := range splitLines(state.text) {
					e := entriesOf(line)[0]
					writeTree(t, dir, files{e.Name: e.body})
					must(t, os.Chmod(filepath.Join(dir, e.Name), fs.FileMode(e.Mode)))
				}
				if remove {
					must(t, os.Remove(u.backup))
				}
				return u
			}))
		}
	}
}

// TestUnsettled: an update fails, and changes nothing, while what an earlier one left
// cannot be recovered. Other sensors can be updated.
func TestUnsettled(t *testing.T) {
	dir := t.TempDir()
	before := files{"sensors/demo/check": printing(2), "sensors/.picket-old-demo/check": printing(1)}
	u := testUpdater(t, dir, before)
	broken := errors.New("broken disk")
	u.step = func(what string) error {
		if what == "rename "+u.at(oldPrefix+"demo") || strings.HasPrefix(what, "mkdir "+u.backup) {
			return broken
		}
		return nil
	}
	has(t, "a change", u.plainInstall(demo(t, 3)), "not settled…broken disk")
	equal(t, "after it", readTree(t, dir), before)
	must(t, u.install(ctx, "other", fromText(packageOf(t, entry("other/check", printing(3))), "")))
	u.step = nil
	must(t, u.plainInstall(demo(t, 3)))
	equal(t, "the new version", string(readFile(t, u.at("demo", "check"))), printing(3))
	equal(t, "versions before", len(u.demoBackups()), 2)

	u.step = func(what string) error {
		if file, ok := strings.CutPrefix(what, "rename "); ok && strings.HasPrefix(file, u.at(stagingPrefix)) {
			return os.RemoveAll(file)
		}
		return nil
	}
	has(t, "a new version that vanishes", u.plainInstall(demo(t, 4)), "no such file or directory")
	equal(t, "the version", string(readFile(t, u.at("demo", "check"))), printing(3))
	must(t, u.recover(ctx))
	u.step, u.sensors.executable = nil, strings.Repeat("x", 300) // nobody can tell whether it is there
	writeTree(t, dir, files{"sensors/.picket-swap-demo/check": printing(2)})
	before = readTree(t, dir)
	has(t, "a disk that does not tell", u.plainInstall(demo(t, 4)), "not settled…file name too long")
	equal(t, "after it", readTree(t, dir), before)
}

// TestOneStepFails makes each step of an update fail once, or twice: an error means that
// nothing has changed.
func TestOneStepFails(t *testing.T) {
	broken := errors.New("broken disk")
	once := crashes(t)
	for i, c := range append(once, once...) {
		for n, steps := 1, new(int); n == 1 || *steps >= n-1; n++ {
			u := c.updater(t, "")
			before, failing := readTree(t, filepath.Dir(u.backup)), "nothing"
			steps = c.watch(u, func(what string, step int) error {
				if step == n {
					failing = what
					return broken
				} else if what == failing && i >= len(once) {
					failing = "nothing"
					return broken
				}
				return nil
			})
			err := c.run(u)
			c.watch(u, healthy)
			must(t, u.recover(ctx))
			where := fmt.Sprintf("%s, step %d, %v", c.name, n, err)
			if err != nil {
				c.intact(t, u, where, c.outcome[0])
				equal(t, where, readTree(t, filepath.Dir(u.backup)), before)
			} else {
				c.intact(t, u, where, c.outcome[1])
			}
		}
	}
}

// TestCrashKill kills a process at each step of every change.
func TestCrashKill(t *testing.T) {
	var dir string
	var change, at int
	if _, err := fmt.Sscan(os.Getenv("PICKET_TEST_CRASH"), &dir, &change, &at); err == nil { // this is the process
		c, u := crashes(t)[change], testUpdater(t, dir, nil)
		c.watch(u, func(_ string, step int) error {
			if step == at {
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
			return nil
		})
		must(t, c.run(u))
		return
	}
	for i, c := range crashes(t) {
		for n := 1; ; n++ {
			u := c.updater(t, "")
			cmd := exec.Command(get(os.Executable()), "-test.run=^TestCrashKill$")
			cmd.Env = append(os.Environ(), fmt.Sprintf("PICKET_TEST_CRASH=%s %d %d", filepath.Dir(u.backup), i, n))
			out, err := cmd.CombinedOutput()
			where := fmt.Sprintf("%s, killed at step %d", c.name, n)
			must(t, u.recover(ctx))
			c.intact(t, u, where, c.outcome...)
			if err == nil {
				break // it was through
			}
			has(t, where+string(out), err, "killed")
			total("points at which a change was killed", 1)
		}
	}
}

// runsEnd waits until those runs have ended that are under way now.
func (s *sensors) runsEnd(t testing.TB) {
	t.Helper()
	s.mu.Lock()
	runs := maps.Clone(s.processes)
	s.mu.Unlock()
	await(t, "the end of runs", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		maps.DeleteFunc(runs, func(p *process, _ bool) bool { return !s.processes[p] })
		return len(runs) == 0
	})
}

// TestUpdateUnderLoad: readings at full rate while their sensor is replaced, a hundred times by
// its agent or another process; none fails, unless its sensor is changed twice meanwhile.
func TestUpdateUnderLoad(t *testing.T) {
	script := func(n int) string { return fmt.Sprintf("#!/bin/sh\n. ./lib && echo $((n + %d))\n", n) }
	b := newBox(t, "[sensor]\nbackup = backup\n", files{"sensors/demo/check": script(0), "sensors/demo/lib": "n=0"})
	b.readings = make(chan storedReading, 1<<18) // received at the end
	updater := b.run(t).active.Load().updater
	var over atomic.Bool
	asked := make(chan int, 1)
	go func() {
		n := 0
		for ; !over.Load(); n++ {
			_, err := b.client.call(ctx, "cmd_submit_reading", n, "demo")
			expect(t, err == nil, "got %v; want no error", err)
		}
		asked <- n
	}()
	for i := 1; i <= 100; i++ {
		updater.sensors.runsEnd(t)
		archive := packageOf(t, entry("demo/check", script(i)), entry("demo/lib", fmt.Sprint("n=", i)))
		if i%10 > 0 {
			must(t, updater.plainInstall(fromText(archive, "")))
			continue
		}
		writeTree(t, b.dir, files{"demo.tar.bz2": archive})
		out, err := self(t, b.dir, "install", "demo.tar.bz2").CombinedOutput()
		expect(t, err == nil, "install: got %v: %s; want no error", err, out)
	}
	over.Store(true)
	n := receive(t, "the number of readings", asked)
	for i := 0; i < n; i++ {
		got := receive(t, "reading", b.readings)
		value, err := strconv.Atoi(got.value) // odd: half of one version, half of another
		expect(t, got.code == 0 && err == nil && value%2 == 0, "got %+v; want an even value", got)
	}
	total("readings during updates", n)
}

// TestCommandLine runs the command lines of testdata/commands.txt.
func TestCommandLine(t *testing.T) {
	tests, dir := cases(t, "testdata/commands.txt"), t.TempDir()
	public, _ := signify(t, "keynum_1")
	defer os.Chdir(get(os.Getwd()))
	must(t, os.Chdir(dir))
	empty, full := newRecorder(t), newRecorder(t)
	full.packages, full.next = dir, "http://next/"
	writeTree(t, dir, files{
		"key.pub": public, "keys/key.pub": public, "none.pub": "rubbish\n", "nokeys/none.pub": "rubbish\n",
		"broken.cfg": "x\n[sensor]\ny\n", "wrong.cfg": "[sensor]\ntimeout = x\n",
		"taken.cfg": "[agent]\nlisten = " + empty.url.Host + "\n", "s.tar.bz2": "package", "s.tar.bz2.sig": "signature",
	})
	must(t, syscall.Mkfifo("fifo", 0o600))
	writeTree(t, "sensors", files{"s/check": `#!/bin/sh
		case $1 in
		options) echo "x  what x is";;
		fail) echo oops >&2; exit 4;;
		hang) kill -9 $$;;
		text) echo text;;
		*) echo 42;;
		esac`})
	defer func(before *os.File) { os.Stderr = before }(os.Stderr)
	os.Stderr = get(os.Create("stderr"))
	defer os.Stderr.Close()
	fill := strings.NewReplacer("MONITOR", empty.url.String(), "FULL", full.url.String(), `\n`, "\n")
	for _, test := range tests {
		steps := strings.Split(strings.ReplaceAll(test.text, "EUID", strconv.Itoa(os.Geteuid())), "$ ")
		writeTree(t, ".", files{"client.cfg": steps[0]})
		if steps[0] == "" {
			must(t, os.Remove("client.cfg"))
		}
		for _, step := range steps[1:] {
			command, want, _ := strings.Cut(step, "\n")
			var got string
			if command == "cat" {
				got = string(readFile(t, "client.cfg"))
			} else {
				lines := logged(t)
				said := picket(get(splitWords(fill.Replace(command)))...)
				got = lines.String() + said
			}
			expect(t, like(got, want), "%s: %s: got\n%s\nwant\n%s", test.name, command, got, want)
		}
	}
	equal(t, "what the sensor says", string(readFile(t, "stderr")), "oops\n")
}

// TestHelp: a screen lists the commands. Each has a page with an example, and is in
// a document.
func TestHelp(t *testing.T) {
	lines, document := splitLines(picket("help")), string(readFile(t, "docs/configuration.md"))
	expect(t, len(lines) <= 25, "got %d lines; want a screen", len(lines))
	for _, c := range subcommands[1:] {
		has(t, "the document", document, "`picket "+c.name)
		has(t, c.name, c.page, "\n  …picket "+c.name)
		lines = append(lines, splitLines(c.page)...)
	}
	for _, line := range lines {
		expect(t, len(line) <= 80, "got %q; want 80 columns", line)
	}
}

// probeBox runs a box with sensors and a prober, and returns what that prints and its
// address. The sensor hangs waits for the file that is returned last.
func probeBox(t testing.TB) (b *box, out *lockedBuffer, probes, hangs string) {
	t.Helper()
	hangs = filepath.Join(t.TempDir(), "gate")
	b = newBox(t, "", files{
		"sensors/number/check": "#!/bin/sh\necho -0.50\n", "sensors/count/check": "#!/bin/sh\necho $#\n",
		"sensors/disk/check": "#!/bin/sh\necho 61.2\n", "sensors/net/check": "#!/bin/sh\necho -3\n",
		"sensors/fails/check": "#!/bin/sh\necho 7; exit 3\n", "sensors/text/check": "#!/bin/sh\necho text\n",
		"sensors/hangs/check": "#!/bin/sh\nuntil [ -e '" + hangs + "' ]; do sleep 0.02; done; echo 3\n",
	})
	out = &lockedBuffer{}
	p := newProber(nil, out)
	b.stored = p.stored
	probes = serve(t, p.handler).Host
	b.run(t)
	return b, out, probes, hangs
}

// fetch asks for a page, and returns its HTTP status and its body.
func fetch(t testing.TB, url, timeout string) (int, string) {
	t.Helper()
	r := get(http.NewRequest(http.MethodGet, url, nil))
	if timeout != "" {
		r.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", timeout)
	}
	answer, err := http.DefaultClient.Do(r)
	must(t, err)
	defer answer.Body.Close()
	return answer.StatusCode, string(get(io.ReadAll(answer.Body)))
}

// scrape asks a prober, and returns the HTTP status and the body without HELP and TYPE.
func scrape(t testing.TB, probes, path, timeout string) string {
	t.Helper()
	status, body := fetch(t, "http://"+probes+path, timeout)
	return fmt.Sprintf("%d\n%s", status, regexp.MustCompile(`(?m)^# (HELP|TYPE) .*\n`).ReplaceAllString(body, ""))
}

// TestProbe asks what testdata/probes.txt has. Then the readings that no probe waits for
// come, and are printed; those of another form are refused.
func TestProbe(t *testing.T) {
	b, out, probes, hangs := probeBox(t)
	echo := func(_ request, params []any) (any, error) {
		return "OK", b.stored(storedReading{ticket: params[0], value: params[2].(string)})
	}
	early := serve(t, newHandler([]method{{"cmd_submit_reading", "string string string string", "", echo}})).Host
	many := ""
	for i := 0; i < maxReads-1; i++ {
		many += fmt.Sprint("&read=count+", i)
	}
	fill := strings.NewReplacer(
		"BOX", b.client.url.Host, "EARLY", early, "AWAY", "127.0.0.1:1", "SELF", b.url.Host, "READS", many)
	for _, c := range cases(t, "testdata/probes.txt") {
		path, timeout, _ := strings.Cut(c.name, " ")
		got := scrape(t, probes, fill.Replace(path), timeout)
		expect(t, like(got, c.text), "%s: got\n%s\nwant\n%s", c.name, got, c.text)
		expect(t, !strings.Contains(got, "secret"), "%s: got a password in %s", c.name, got)
	}
	for request, want := range map[string]string{
		"POST /probe HTTP/1.0\r\n\r\n":                              "405",
		"GET /probe HTTP/1.0\r\nSec-Fetch-Site: cross-site\r\n\r\n": "403",
		"GET /metrics HTTP/1.0\r\nHost: page.example:9810\r\n\r\n":  "403",
	} {
		equal(t, request, exchange(t, probes, request), want)
	}
	equal(t, "what is printed", out.String(), "")

	writeTree(t, "", files{hangs: ""})
	wantLog(t, out, " 127.0.0.1 ticket \"probe-…\": exit 0, value 3, late\n… exit 0, value 3, late\n")
	at := dateTime("20261122T20:43:21")
	monitor := testClient(t, b.url, nil)
	mustCall(t, monitor, "cmd_store_probe_data", "probe-7", []any{0, "1"}, at)
	mustCall(t, monitor, "cmd_store_probe_data", 7, []any{0, "1"}, at)
	has(t, "what is printed", out, " 127.0.0.1 ticket \"probe-7\": exit 0, value 1, unknown\n"+
		"20261122T20:43:21 127.0.0.1 ticket 7: exit 0, value 1\n")
	for _, params := range [][]any{
		{1, []any{0, 0.5}, at}, {1, []any{0, "1"}, string(at)}, {1, []any{0, "1"}}, {1.5, []any{0, "1"}, at},
	} {
		equal(t, fmt.Sprint(params), verdict(monitor.call(ctx, "cmd_store_probe_data", params...)), "-32602")
	}
	has(t, "counts", scrape(t, probes, "/metrics", ""), `{result="stored"} 47…{result="late"} 2…{result="unknown"} 1`)
}

// TestProbeTarget: the forms of a target.
func TestProbeTarget(t *testing.T) {
	for v, want := range map[string]string{
		"box": "http://box:8080/xmlrpc/", "box:81": "http://box:81/xmlrpc/", "box:": "http://box:8080/xmlrpc/",
		"https://box": "https://box:8080/xmlrpc/", "http://u:p@box/": "http://u:p@box:8080/",
		"[fd00::1]": "http://[fd00::1]:8080/xmlrpc/", "[fd00::1]:81": "http://[fd00::1]:81/xmlrpc/",
		"10.0.0.1": "http://10.0.0.1:8080/xmlrpc/", "box/RPC2": "http://box:8080/RPC2",
	} {
		u, err := probeTarget(v)
		must(t, err)
		equal(t, v, u.String(), want)
	}
}

// TestProbeForgets: tickets of readings that never come do not pile up. A reading that
// comes when its probe is over, or once more, is late. Nothing of this waits for whoever
// reads what is printed.
func TestProbeForgets(t *testing.T) {
	printed, out := io.Pipe()
	p := newProber(nil, out)
	go p.stored(storedReading{ticket: 7})
	get(printed.Read(make([]byte, 1))) // the rest of the line waits
	p.out = log.New(io.Discard, "", 0)
	defer printed.Close()
	waiting, late := &probeRead{}, &probeRead{}
	p.expect([]*probeRead{waiting, late})
	p.forget([]*probeRead{late})
	for _, read := range []*probeRead{late, waiting, waiting} {
		must(t, p.stored(storedReading{ticket: read.ticket}))
	}
	receive(t, "the reading", waiting.arrived)
	_, came := <-late.arrived
	expect(t, !came, "got a reading of a probe that is over")
	equal(t, "tickets", len(p.waiting), 0)
	equal(t, "counts", p.counts, map[string]int{"stored": 2, "late": 2})
}

// TestManyBoxes: none of the probes of many boxes is lost, neither at once nor, with
// -probed, one after the other for so long, each box every 15 s. It tells what that took.
func TestManyBoxes(t *testing.T) {
	dir := t.TempDir()
	monitor := start(t, exec.Command(binary(t), "monitor", "-listen", "127.0.0.1:0", "-probe", "127.0.0.1:0"))
	url, probes := monitor.address(t), monitor.address(t)
	writeTree(t, dir, files{
		"sensors/s/check": printing(1), "client.cfg": "[monitor]\nurl = http://" + url + "/\n[agent]\nlisten = 127.0.0.1:0\n",
	})
	targets := make([]string, *boxes)
	for i := range targets {
		targets[i] = start(t, exec.Command(binary(t), "-c", filepath.Join(dir, "client.cfg"))).address(t)
	}
	longest := make([]time.Duration, len(targets))
	probe := func(i int) {
		begun := time.Now()
		path := "/probe?target=" + targets[i] + "&read=s&read=picket+uptime"
		got := scrape(t, probes, path, "10")
		expect(t, strings.Contains(got, "probe_success 1\n"), "got %s; want readings", got)
		longest[i] = max(longest[i], time.Since(begun))
	}
	n, begun := len(targets), time.Now()
	parallel(n, probe)
	t.Logf("%d boxes at once: %v, peak of memory %d KiB", n, time.Since(begun),
		residentMemory(t, monitor.Process.Pid, "VmHWM"))
	if *probed > 0 {
		clear(longest)
		parallel(n, func(i int) {
			time.Sleep(probeInterval * time.Duration(i) / time.Duration(n))
			for ; time.Since(begun) < *probed; time.Sleep(probeInterval) {
				probe(i)
			}
		})
		t.Logf("one after the other for %v: the longest took %v", *probed, slices.Max(longest))
	}
	monitor.terminate(t)
	t.Logf("the monitor took %v of processor time", monitor.processTime())
}

// TestPrometheus: Debian's Prometheus with the configuration in contrib asks agents, and
// notices that one has ended.
func TestPrometheus(t *testing.T) {
	prometheus, promtool := needs(t, "prometheus"), needs(t, "promtool")
	runTool(t, "contrib", promtool, "check", "config", "prometheus.yml")
	runTool(t, "contrib", promtool, "check", "rules", "alerts.yml")
	b := newBox(t, "", files{
		"sensors/disk/check": "#!/bin/sh\necho 61.2\n", "sensors/memory/check": printing(48),
		"sensors/processes/check": printing(1), "sensors/cpu_load/check": printing(7),
	})
	monitor := start(t, self(t, b.dir, "monitor", "-listen", "127.0.0.1:0", "-probe", "127.0.0.1:0"))
	b.configure(t, strings.Replace(b.config, b.url.Host, monitor.address(t), 1))
	probes, ends := monitor.address(t), b.start(t)
	box := b.client.url.Host
	b.start(t)
	other := b.client.url.Host
	hurry := strings.NewReplacer("127.0.0.1:9810", probes, "_interval: 15s", "_interval: 1s\n  evaluation_interval: 1s")
	writeTree(t, b.dir, files{
		"prometheus.yml": hurry.Replace(string(readFile(t, "contrib/prometheus.yml"))),
		"alerts.yml":     string(readFile(t, "contrib/alerts.yml")),
		"boxes.yml":      fmt.Sprintf("- targets: [%q, %q]\n", box, other),
	})
	for _, path := range []string{"metrics", "probe?read=disk&target=" + box, "probe?read=disk&target=127.0.0.1:1"} {
		_, metrics := fetch(t, "http://"+probes+"/"+path, "")
		check := exec.Command(promtool, "check", "metrics")
		check.Stdin = strings.NewReader(metrics)
		said, err := check.CombinedOutput()
		expect(t, err == nil && len(said) == 0, "%s: promtool says %s, %v", path, said, err)
	}
	api := start(t, exec.Command(prometheus, "--config.file="+b.dir+"/prometheus.yml",
		"--storage.tsdb.path="+b.dir+"/data", "--web.listen-address=127.0.0.1:0")).address(t)
	wants := func(queries [][2]string) {
		for _, q := range queries {
			query := strings.NewReplacer("BOX", box, "OTHER", other).Replace(q[0])
			await(t, query+" is "+q[1], func() bool {
				_, answer := fetch(t, "http://"+api+"/api/v1/query?query="+url.QueryEscape(query), "")
				return strings.Contains(answer, `,"`+q[1]+`"]`)
			})
		}
	}
	wants([][2]string{
		{`picket_reading{sensor="disk",args="percent /",job="disk",instance="BOX"}`, "61.2"},
		{`picket_exit_code{sensor="disk",args="percent /",job="disk",instance="OTHER"}`, "0"},
		{`picket_reading{sensor="cpu_load",args="used",job="load",instance="BOX"}`, "7"},
		{`picket_monitor_readings_total{job="picket_monitor",result="late"}`, "0"},
	})
	ends.terminate(t)
	wants([][2]string{
		{`probe_success{job="disk",instance="BOX"}`, "0"}, {`probe_success{job="disk",instance="OTHER"}`, "1"},
		{`ALERTS{alertname="BoxDown",instance="BOX"}`, "1"},
	})
}

// TestCheckPicket runs contrib/check_picket with the arguments of testdata/nagios.txt, in
// the shells and with the clients that there are.
func TestCheckPicket(t *testing.T) {
	needs(t, "curl")
	busybox := needs(t, "busybox")
	b, _, probes, _ := probeBox(t)
	for path, shell := range map[string][]string{
		os.Getenv("PATH"): {needs(t, "sh")}, busyboxPath(t, busybox): {busybox, "sh"}, // which has a wget, and no curl
	} {
		for _, c := range cases(t, "testdata/nagios.txt") {
			args := append(shell[1:len(shell):len(shell)], "contrib/check_picket", "-m", probes, "-H", b.client.url.Host)
			args = append(args, get(splitWords(c.name))...)
			cmd := exec.Command(shell[0], args...)
			cmd.Env = []string{"PATH=" + path, "http_proxy=http://127.0.0.1:1/"}
			out, _ := cmd.Output() // whose exit code is in what is compared
			got := fmt.Sprintf("%d %s", cmd.ProcessState.ExitCode(), out)
			expect(t, like(got, c.text), "%s, %s: got %s; want %s", shell, c.name, got, c.text)
		}
	}
}

// TestTLS: which certificates the agent trusts as a client and as a server. No move leads
// from TLS to plain HTTP.
func TestTLS(t *testing.T) {
	hour, now := time.Hour, time.Now()
	defer func(before string) { built = before }(built)
	built = fmt.Sprint(now.Unix()) // as the linker writes it
	ours, theirs := newCA(t, "ours"), newCA(t, "theirs")
	box, monitorFiles := ours.valid(t, "box"), ours.valid(t, "monitor")
	alone := box // without mutual TLS
	alone.ca, alone.pool = "", nil
	pinned := box
	pinned.name = "monitor"
	none := monitorFiles // a caller without a certificate
	none.pair = nil
	at := func(clock time.Time) func(*tls.Config) {
		return func(c *tls.Config) { c.Time = func() time.Time { return clock } }
	}
	builtAt := func(built time.Time) func(*tls.Config) {
		return func(c *tls.Config) { c.Time = newTLS(built).Time }
	}
	plain := func(*tls.Config) {}
	trusting := func(c *tls.Config) { c.RootCAs = box.pool }
	old := func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS11, tls.VersionTLS11 }
	const good, invalid = "^OK <nil>$", "expired or is not yet valid"
	methods := (&monitor{}).methods()
	for _, test := range []struct {
		name           string
		server, client tlsFiles
		change         func(client *tls.Config)
		want           string // a regular expression of the answer and the error
	}{
		{"mutual", box, monitorFiles, plain, good},
		{"one-sided", alone, none, plain, good},
		{"pinned", pinned, monitorFiles, plain, good},
		{"pinned to another", pinned, ours.valid(t, "somebody"), plain, "certificate"},
		{"wrong CA of the server", theirs.valid(t, "box"), monitorFiles, plain, "unknown authority"},
		{"not of the system's CAs", alone, tlsFiles{}, plain, "unknown authority"},
		{"wrong CA of the client", box, theirs.valid(t, "monitor"), trusting, "certificate"},
		{"no client certificate", box, none, plain, "certificate"},
		{"wrong name", alone, none, func(c *tls.Config) { c.ServerName = "elsewhere" }, "not elsewhere|valid for"},
		{"server expired", ours.files(t, "box", now.Add(-2*hour), now.Add(-hour)), monitorFiles, plain, invalid},
		{"server not valid yet", ours.files(t, "box", now.Add(hour), now.Add(2*hour)), monitorFiles, plain, invalid},
		{"client expired", box, ours.files(t, "monitor", now.Add(-2*hour), now.Add(-hour)), plain, "certificate"},
		{"a clock in 1970", alone, none, at(time.Unix(300, 0)), "not yet valid"},
		{"a clock before the build", alone, none, builtAt(now.Add(hour / 4)), good},
		{"one that is long behind it", alone, none, builtAt(now.Add(2 * hour)), "expired"},
		{"expired", alone, none, at(now.Add(2 * hour)), "expired"},
		{"TLS 1.1", alone, none, old, "protocol version"},
		{"TLS 1.2", box, monitorFiles, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, good},
	} {
		_, u := serveTLS(t, methods, test.server)
		config := clientTLS(test.client)
		test.change(config)
		v, err := testClient(t, u, config).call(ctx, "healthcheck")
		got := fmt.Sprint(v, " ", err)
		expect(t, regexp.MustCompile(test.want).MatchString(got), "%s: got %s; want %s", test.name, got, test.want)
	}
	_, u := serveTLS(t, (&monitor{next: "http://127.0.0.1:1/"}).methods(), alone)
	_, err := nextMonitor(ctx, testClient(t, u, clientTLS(none)), httpURL)
	has(t, "a move", err, "from https to http://127.0.0.1:1/")
}

// TestTLSReplaced: a caller with a certificate of a CA that was replaced is served no
// more, not even over a connection or session from before. A call under way is answered.
func TestTLSReplaced(t *testing.T) {
	ours, theirs := newCA(t, "ours"), newCA(t, "theirs")
	box := ours.valid(t, "box")
	began, end := make(chan bool), make(chan bool)
	h, u := serveTLS(t, []method{
		{"healthcheck", "string", "OK.", healthcheck},
		{"wait", "string", "", func(request, []any) (any, error) { began <- true; <-end; return "OK", nil }},
	}, box)
	config := clientTLS(ours.valid(t, "monitor"))
	config.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	idle, waiting := testClient(t, u, config), testClient(t, u, config)
	*idle.idleTimeout(), *waiting.idleTimeout() = patience, patience
	mustCall(t, idle, "healthcheck")
	answered := make(chan error, 1)
	go func() { _, err := waiting.call(ctx, "wait"); answered <- err }()
	receive(t, "the call that waits", began)
	sending, err := tls.Dial("tcp", u.Host, config)
	must(t, err)
	defer sending.Close()
	io.WriteString(sending, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n<")

	box.pool = theirs.valid(t, "x").pool
	h.setAccess(&access{tls: serverTLS(box)})
	close(end)
	must(t, receive(t, "an answer to the call that waited", answered))
	for _, c := range []*client{idle, waiting} {
		v, err := c.call(ctx, "healthcheck")
		expect(t, err != nil, "got %v; want an error", v)
	}
	sending.SetReadDeadline(time.Now().Add(patience))
	if n, err := sending.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a call that came half: got %d bytes, %v; want the end", n, err)
	}
	other := theirs.valid(t, "monitor")
	other.pool = ours.valid(t, "x").pool
	mustCall(t, testClient(t, u, clientTLS(other)), "healthcheck")
}

// TestStarts: in whatever state of testdata/starts.txt picket is started, it takes
// commands, runs sensors, ends those that hang, and obeys its signals.
func TestStarts(t *testing.T) {
	for _, c := range cases(t, "testdata/starts.txt") {
		c := c
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			switch c.name {
			case "blocked signals":
				needs(t, "python3")
			case "no /proc":
				needsRoot(t)
				needs(t, "unshare")
			}
			free := listen(t, "127.77.0.1:0") // no other test has this address
			free.Close()
			more := "listen = " + free.Addr().String() + "\n[sensor]\ntimeout = 1\n"
			b := newBox(t, more, files{
				"sensors/s/check": "#!/bin/sh\nread x && exit 1; echo 1", "sensors/hang/check": "#!/bin/sh\nexec sleep 60",
			})
			p := start(t, wrapped(self(t, b.dir), "sh", "-c", c.text, "sh"))
			b.client = clientOf(t, free.Addr().String())
			await(t, "it answers", func() bool { _, err := b.client.call(ctx, "healthcheck"); return err == nil })
			wants(t, b.read(t, 1, "s"), "ticket 1: exit 0, value 1")
			wants(t, b.read(t, 2, "hang"), "ticket 2: exit -15, value nan")
			if !strings.Contains(c.name, "log") {
				p.signal(t, syscall.SIGUSR1)
				wantLog(t, &p.log, "health: ")
				p.signal(t, syscall.SIGHUP)
				wantLog(t, &p.log, "is in force; monitor ")
			}
			p.terminate(t)
		})
	}
}

// TestManySensors: a thousand sensors with long help texts are listed within
// the limits of a message, in 16 MiB.
func TestManySensors(t *testing.T) {
	tree := files{"help": strings.Repeat("<&> what it can be asked\n", 100)}
	for i := 0; i < 1000; i++ {
		tree[fmt.Sprintf("sensors/%060d/check", i)] = "#!/bin/sh\ncat ../../help"
	}
	b := newBox(t, "", tree)
	p, limited := b.startTiny(t)
	listed := mustCall(t, b.client, "cmd_list_sensors").(map[string]any)
	size := 0
	for name, help := range listed {
		text := len(encodeResponse(help, nil)) - len(encodeResponse("", nil))
		expect(t, text <= 1<<10, "%s: got a help text of %d bytes; want 1 KiB at most", name, text)
		size += len(name) + text
	}
	if answer := len(encodeResponse(listed, nil)); size > 48<<10 || answer > 64<<10 || len(listed) < 100 {
		t.Errorf("got %d sensors of %d bytes, an answer of %d; want 100, 48 KiB, 64 KiB", len(listed), size, answer)
	}
	wantLog(t, &p.log, "left out")
	t.Logf("%d sensors, limited: %v", len(listed), limited)
	p.terminate(t)
}

// TestStoryTLS follows docs/tls.md: it makes the certificates with openssl,
// and has an agent and a stand-in monitor trust only each other.
func TestStoryTLS(t *testing.T) {
	needs(t, "openssl")
	commands := docBlocks(t, "docs/tls.md", "sh")[0]
	equal(t, "commands", strings.Count(commands, "openssl "), 5)
	b := newBox(t, "", files{"sensors/s/check": printing(1)})
	cmd := exec.Command("sh", "-e", "-c", commands)
	cmd.Dir = b.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("this openssl cannot: %v\n%s", err, out)
	}
	pair := loadTLS(t, b.dir, "monitor")
	monitor := start(t, self(t, b.dir, "monitor", "-listen", "127.0.0.1:0", "-probe", "127.0.0.1:0",
		"-cert", "monitor.crt", "-key", "monitor.key", "-ca", "ca.crt",
		"-agent-cert", "monitor.crt", "-agent-key", "monitor.key", "-agent-ca", "ca.crt"))
	_, port, _ := net.SplitHostPort(monitor.address(t))
	config := docBlocks(t, "docs/tls.md", "ini")[0]
	config = strings.Replace(config, "https://monitor:8081/", "https://localhost:"+port+"/", 1)
	b.configure(t, config+"listen = 127.0.0.1:0\n")
	b.start(t)
	_, port, _ = net.SplitHostPort(b.client.url.Host)
	call := func(flags ...string) string {
		args := append(append([]string{"call"}, flags...), "https://localhost:"+port+"/")
		return picket(append(args, "cmd_submit_reading", "7", "s")...)
	}
	equal(t, "a call", call("-cert", pair.certificate, "-key", pair.key, "-ca", pair.ca), "exit 0\nOK\n")
	probes := monitor.address(t)
	probe := scrape(t, probes, "/probe?target=https://localhost:"+port+"&read=s", "")
	has(t, "a probe", probe, `picket_reading{sensor="s",args=""} 1`)
	has(t, "a plain probe", scrape(t, probes, "/probe?target=localhost:"+port+"&read=s", ""), "it speaks TLS there")
	box := loadTLS(t, b.dir, "box") // which the agent does not know by name
	for _, flags := range [][]string{{"-ca", pair.ca}, {"-ca", pair.ca, "-cert", box.certificate, "-key", box.key}, {}} {
		has(t, fmt.Sprint(flags), call(flags...), "exit 1\n")
	}
	v, err := b.client.call(ctx, "healthcheck")
	expect(t, err != nil, "plain HTTP: got %v; want an error", v)
}

// TestStoryPassword: the password of the monitor's URL is in no log and in no
// output, wherever in client.cfg or on the command line it stands.
func TestStoryPassword(t *testing.T) {
	dir, list := t.TempDir(), cases(t, "testdata/passwords.txt")
	for _, section := range list[1:] {
		for _, line := range splitLines(section.text) {
			config := section.name + "\n" + line + "\n"
			lines := logged(t)
			writeTree(t, dir, files{"client.cfg": config, "sensors/s/check": printing(1)})
			for _, command := range splitLines(list[0].text) {
				got := picket(append([]string{"-c", filepath.Join(dir, "client.cfg")}, strings.Fields(command)...)...)
				expect(t, !regexp.MustCompile("geheim|geh%|eim@").MatchString(got+lines.String()),
					"%q: %s: got %s%s; want no password", config, command, got, lines)
			}
		}
	}
}

// TestStories runs the stories of testdata/stories.txt. After each the agent has nothing
// left to do, and has counted what the monitors got; no process is left of it.
func TestStories(t *testing.T) {
	binary(t) // parallel tests cannot build it
	for _, c := range cases(t, "testdata/stories.txt") {
		c := c
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newStory(t)
			for _, line := range splitLines(c.text) {
				s.step(t, line)
			}
			if s.agent != nil && s.agent.ProcessState == nil {
				before, figures := len(s.agent.log.String()), "queued 0 running 0 undelivered 0 delivered %d dropped 0 refused …"
				await(t, "nothing is left", func() bool {
					s.agent.signal(t, syscall.SIGUSR1)
					return like(s.agent.log.String()[before:], "…health: uptime … "+fmt.Sprintf(figures, s.stored))
				})
				s.agent.terminate(t)
			}
			equal(t, "readings of which no line tells", len(s.untold)+len(s.got), 0)
			awaitNone(t, s.dir)
		})
	}
}

// A story is a box with two monitors, whose agent is a child.
type story struct {
	*box
	agent  *child
	vars   map[string]string // what $NAME stands for
	err    error             // of the latest call
	said   string            // by the latest call or shell command
	held   chan attempt      // calls that the monitor holds
	hold   chan bool         // is closed when it goes on
	got    chan [2]string    // readings that the monitors get, and their times
	untold []string          // those of which no line has told
	stored int               // how many there were
	read   int               // bytes of the log of which lines have told
}

func newStory(t *testing.T) *story {
	public, _ := signify(t, "keynum_1")
	s := &story{
		box: newBox(t, "", files{"packages/": "", "key.pub": public}),
		got: make(chan [2]string, 1000), hold: make(chan bool), held: make(chan attempt, 10),
	}
	next := newRecorder(t)
	for from, m := range map[string]*recorder{"": s.recorder, "next ": next} {
		from := from
		m.stored = func(r storedReading) error {
			at, text, _ := strings.Cut(r.String(), " 127.0.0.1 ")
			s.got <- [2]string{from + text, at}
			return nil
		}
	}
	pair := newCA(t, "ca").valid(t, "monitor")
	_, secure := serveTLS(t, next.methods(), pair)
	secure.Scheme = "http"
	closes := listenRaw(t, "127.0.0.1:0", func(net.Conn) {})
	ill := func(request, []any) (any, error) { return "ILL", nil }
	sick := serve(t, newHandler([]method{{"healthcheck", "string", "", ill}}))
	s.vars = map[string]string{
		"SICK": sick.String(), "NEXT": next.url.String(), "MONITOR": s.url.String(),
		"SECURE": secure.String(), "PLAIN": "https" + strings.TrimPrefix(s.url.String(), "http"),
		"CLOSES": "http://" + closes.Addr().String() + "/", "TLS": filepath.Dir(pair.ca),
		"PICKET": "'env PICKET_TEST_MAIN=1 " + get(os.Executable()) + "'",
	}
	return s
}

// step takes a line of a story.
func (s *story) step(t *testing.T, line string) {
	t.Helper()
	word, rest, _ := strings.Cut(line, " ")
	name, script, _ := strings.Cut(rest, ": ")
	if !strings.HasPrefix(line, "\t") {
		must(t, s.err)
	}
	switch word {
	case "sensor":
		writeTree(t, s.dir+"/sensors", files{name + "/check": "#!/bin/sh\n" + script + "\n"})
	case "package":
		base := filepath.Base(name)
		check := entry(base+"/check", "#!/bin/sh\n"+script+"\n")
		writeTree(t, s.packages, files{name + ".tar.bz2": packageOf(t, entry(base+"/", ""), check)})
	case "option":
		s.configure(t, s.config+strings.Replace(s.expand(rest), " ", "\n", 1)+"\n")
	case "root":
		needsRoot(t)
		if err := exec.Command(needs(t, "unshare"), "-mp", "--fork", "true").Run(); err != nil {
			t.Skip("root has no right to mount: unshare:", err)
		}
	case "needs":
		needs(t, rest)
	case "source":
		shipped(t, rest) // or the story is skipped
		runTool(t, "", "cp", "-r", rest, s.dir)
	case "binary":
		runTool(t, "", "cp", binary(t), s.dir)
	case "syslog":
		s.syslog(t)
	case "many":
		for i := 0; i < 450; i++ {
			s.step(t, strings.ReplaceAll(rest, "#", strconv.Itoa(i)))
			s.follows(t, "ticket", "…")
		}
	case "lock":
		lockFile(t, filepath.Join(s.dir, rest))
	case "start":
		cmd := wrapped(self(t, s.dir), "sh", "-c", rest, "sh")
		cmd.Env = append(cmd.Env, "STORY="+s.dir)
		s.agent, s.read = s.startAs(t, cmd), 0
		s.vars["AGENT"], s.vars["ADDRESS"] = fmt.Sprint(s.agent.Process.Pid), s.client.url.Host
	case "$":
		for name, value := range s.vars {
			rest = name + "=" + value + "; " + rest
		}
		s.said = runTool(t, s.dir, "timeout", "30", "sh", "-e", "-c", rest)
	case "next":
		s.next = s.expand(rest)
	case "monitor":
		s.rule(rest)
	default:
		if strings.HasPrefix(line, "\t") {
			s.follows(t, strings.TrimPrefix(word, "\t"), s.expand(rest))
			return
		}
		if s.agent == nil {
			s.step(t, `start exec "$@"`)
		}
		var v any
		v, s.err = s.client.call(ctx, word, fromJSON(t, rest)...)
		s.said = readable(v)
	}
}

// syslog takes what comes to dev/log in the box into the file syslog, as long as that exists.
// The path of a socket has 107 bytes at most, so the story has a short name.
func (s *story) syslog(t *testing.T) {
	path := filepath.Join(s.dir, "dev/log")
	l := get(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}))
	t.Cleanup(func() { l.Close() })
	f := get(os.Create(filepath.Join(s.dir, "syslog")))
	go func() {
		defer f.Close()
		for line := make([]byte, 4<<10); exists(f.Name()); {
			n, _ := l.Read(line) // 0 at the end
			f.Write(line[:n])
		}
	}()
}

// rule has the monitor refuse or hold a method, or take all. By a new rule it answers
// what it has held.
func (s *story) rule(what string) {
	verb, method, _ := strings.Cut(what, " ")
	held, hold := s.hold, make(chan bool)
	s.hold = hold
	s.set(func(w http.ResponseWriter, a attempt) bool {
		if a.method != method {
			return false
		} else if verb == "refuses" {
			return away(w, a)
		}
		s.held <- a
		<-hold
		s.mu.Lock()
		answer := s.misbehave
		s.mu.Unlock()
		return answer(w, a)
	})
	close(held)
}

// expand replaces the variables in a text.
func (s *story) expand(text string) string {
	return os.Expand(text, func(name string) string { return s.vars[name] })
}

// follows wants what a line tells that follows from the one before.
func (s *story) follows(t *testing.T, word, want string) {
	t.Helper()
	switch word {
	case "fault":
		has(t, "the fault", s.err, "fault "+want+": ")
		s.err = nil
	case "says":
		expect(t, like(strings.Join(strings.Fields(s.said), " "), want), "got %q; want %q", s.said, want)
	case "held":
		receive(t, "a call that the monitor holds", s.held)
	case "log":
		part := regexp.MustCompile("(?s)" + strings.ReplaceAll(regexp.QuoteMeta(want), "…", ".*?"))
		await(t, "the log has "+want, func() bool {
			place := part.FindStringIndex(s.agent.log.String()[s.read:])
			if place != nil {
				s.read += place[1]
			}
			return place != nil
		})
	case "logged":
		times, text, _ := strings.Cut(want, " ")
		equal(t, text+" in the log", fmt.Sprint(strings.Count(s.agent.log.String(), text)), times)
	case "exit":
		got := fmt.Sprint(s.agent.wait(t))
		expect(t, like(got, want), "got exit %s; want %s", got, want)
	default: // a reading
		want = word + " " + want
		for i := -1; i < 0; {
			i = slices.IndexFunc(s.untold, func(got string) bool { return like(got, want) })
			if i < 0 {
				got := receive(t, fmt.Sprintf("%s, but %q", want, s.untold), s.got)
				s.untold, s.vars["TIME"] = append(s.untold, got[0]), got[1]
				s.stored++
			} else {
				s.untold = slices.Delete(s.untold, i, i+1)
			}
		}
	}
}

// TestStoryHanging: an old dispatcher gives its commands over one connection, waits for
// each answer however long it takes, and dies of a Fault. It gets none, although two
// sensors hang and the queue is full behind them, and each ticket is stored once.
func TestStoryHanging(t *testing.T) {
	hang := "#!/bin/sh\nsleep 60"
	b := newBox(t, "[sensor]\ntimeout = 200ms\n", files{"sensors/one/check": hang, "sensors/two/check": hang})
	a := b.run(t)
	long := strings.Repeat("x", maxTicket+1)
	equal(t, "a long ticket", verdict(b.client.call(ctx, "cmd_submit_reading", long, "one")), "-32602")
	*b.client.idleTimeout() = patience
	const n = 330 // more than run and wait together
	want := make(map[any]string)
	for i := 0; i < n; i++ {
		params := []any{i, "picket", "running"}
		if want[i] = "0"; i%20 < 2 {
			params, want[i] = []any{i, []string{"one", "two"}[i%20]}, "-15"
		}
		equal(t, fmt.Sprint("ticket ", i), mustCall(t, b.client, "cmd_submit_reading", params...), any("OK"))
	}
	got := getsAll(t, b.recorder, n)
	for ticket, outcome := range got {
		got[ticket], _, _ = strings.Cut(outcome, " ")
	}
	equal(t, "the readings", got, want)
	await(t, "nothing is left", func() bool { return a.delivery.count().undelivered == 0 })
	equal(t, "more readings", len(b.readings), 0)
}

// TestKill kills the agent at random moments under load, and sometimes leaves a torn record
// in its spool. No reading that was in the spool is lost, and none is made up.
func TestKill(t *testing.T) {
	random := mathrand.New(mathrand.NewSource(1))
	b := newBox(t, "[monitor]\nspool = spool\n", files{"sensors/s/check": "#!/bin/sh\necho $1\n"})
	b.readings = make(chan storedReading, 1<<20)
	spool := filepath.Join(b.dir, "spool")
	sent, owed := 0, make(map[string]bool)
	for n := 0; n < *kills; n++ {
		b.set(away)
		if random.Intn(3) == 0 {
			b.set(nil)
		}
		p := b.start(t)
		for i := random.Intn(30); i > 0; i-- {
			sent++
			// Acknowledged or not: the agent is to be killed.
			b.client.call(ctx, "cmd_submit_reading", sent, "s", []any{sent})
		}
		time.Sleep(time.Duration(random.Intn(20)) * time.Millisecond) // any moment will do
		p.signal(t, syscall.SIGKILL)
		p.wait(t)
		b.client.close()
		for _, reading := range spooled(t, spool) {
			owed[reading] = true
		}
		if n%3 == 0 {
			writeTree(t, spool, files{spoolFile: spoolText(t, spool) + "garbage with no end"})
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
			t.Errorf("got %+v; want what was asked for", got)
		}
		delivered[text]++
		delete(owed, text)
	}
	awaitSpooled(t, spool, 0)
	p.terminate(t)
	total("kills survived", *kills)
	t.Logf("%d kills, %d commands, %d readings delivered", *kills, sent, len(delivered))
}

// TestSoak does in seconds what years bring: readings of all kinds, updates, reloads,
// moves and a monitor that fails in every way. In the end each acknowledged ticket is
// stored once, or more often if an answer was lost, and everything the agent used is
// given back.
func TestSoak(t *testing.T) {
	word := mark(t)
	summaryOf(testSensors(t, "echo 1"), "s") // begins os/signal's goroutine, which never ends
	goroutines, open := runtime.NumGoroutine(), openFiles(t)
	debug.FreeOSMemory()
	before := residentMemory(t, "self", "VmRSS")
	t.Run("load", func(t *testing.T) { newSoak(t).load(t) })
	awaitNone(t, word)
	await(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= goroutines })
	await(t, "no file is open", func() bool { return openFiles(t) <= open })
	debug.FreeOSMemory()
	after := residentMemory(t, "self", "VmRSS")
	t.Logf("resident memory %d KiB before, %d KiB after", before, after)
	info, _ := debug.ReadBuildInfo()
	races := slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) // which takes more
	expect(t, after <= before+32<<10 || races, "resident memory: got %d KiB; want %d and a little", after, before)
}

// A soak is four callers that ask one agent for everything, and two monitors, each
// of which sends it to the other. They misbehave at random.
type soak struct {
	*box
	other   *recorder
	agent   *agent
	tickets atomic.Int64

	mu      sync.Mutex       // guards what is below
	acked   map[any]string   // what must be stored; "" is anything
	arrived map[any][]string // codes and values
	random  *mathrand.Rand
	lossy   map[any]bool // what was stored, but not confirmed
	faults  map[any]int
	down    int // attempts that the monitors are away for
}

func newSoak(t *testing.T) *soak {
	const config = "[sensor]\nbackup = backup\nconcurrency = 4\ntimeout = 2s\n[monitor]\nspool = spool\n"
	s := &soak{
		random: mathrand.New(mathrand.NewSource(2)), acked: make(map[any]string),
		arrived: make(map[any][]string), lossy: make(map[any]bool), faults: make(map[any]int),
	}
	s.box = newBox(t, config, files{
		"sensors/good/check": "#!/bin/sh\necho $1\n", "sensors/fail/check": "#!/bin/sh\necho no >&2; exit 3\n",
		"sensors/text/check": "#!/bin/sh\necho hello\n", "sensors/hang/check": "#!/bin/sh\nsleep 60\n",
		"sensors/demo/check": printing(1), "packages/demo.tar.bz2": demoPackage(t, 1),
	})
	s.other = newRecorder(t)
	s.next, s.other.next, s.other.packages = s.other.url.String(), s.url.String(), s.packages
	for _, m := range []*recorder{s.recorder, s.other} {
		m.stored = func(r storedReading) error {
			got := fmt.Sprint(r.code, " ", r.value)
			s.locked(func() { s.arrived[r.ticket] = append(s.arrived[r.ticket], got) })
			return nil
		}
		m.set(s.misbehave)
	}
	t.Cleanup(func() { // after the agent's end
		s.agent.active.Load().updater.removeGone(t)
		leavesNothing(t, "soak", s.dir, s.dir+"/sensors", s.dir+"/backup")
	})
	s.agent = s.run(t)
	retryFast(s.agent)
	return s
}

func (s *soak) locked(work func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	work()
}

// troubles are what a monitor answers now and then to a reading that it does not store,
// or that it does.
var troubles = []string{"abort", "503", "fault", "<html>busy</html>", "slow", "stored: abort", "stored: 503"}

// misbehave sometimes does not store a reading, or does not confirm it.
func (s *soak) misbehave(w http.ResponseWriter, a attempt) bool {
	if a.method != "cmd_store_probe_data" {
		return false
	}
	ticket, trouble, stored := a.params[0], "", false
	s.locked(func() {
		if s.down > 0 {
			s.down, trouble = s.down-1, "503"
		} else if i := s.random.Intn(50); i < len(troubles) {
			trouble, stored = strings.CutPrefix(troubles[i], "stored: ")
			s.lossy[ticket] = s.lossy[ticket] || stored
		}
		if trouble == "fault" {
			s.faults[ticket]++
		}
		if s.faults[ticket] == maxTries { // the agent would drop it
			s.faults[ticket], trouble = maxTries-1, ""
		}
	})
	if stored {
		a.store()
		total("answers lost on purpose", 1)
	}
	switch trouble {
	case "":
		return false
	case "slow":
		time.Sleep(20 * time.Millisecond)
		return false
	case "abort":
		panic(http.ErrAbortHandler)
	case "503":
		return away(w, a)
	case "fault":
		w.Write(encodeResponse(nil, faultf(1, "locked")))
	default:
		io.WriteString(w, trouble)
	}
	return true
}

// load has the callers ask until the time is over, and looks at what has arrived.
func (s *soak) load(t *testing.T) {
	begun := time.Now()
	parallel(4, func(i int) {
		random := mathrand.New(mathrand.NewSource(int64(i)))
		for n := 0; time.Since(begun) < *soakTime; n++ {
			behind := 0
			s.locked(func() { behind = len(s.acked) - len(s.arrived) })
			if behind < 2000 { // the spool holds some 7,000
				s.ask(t, random, n)
			} else {
				time.Sleep(time.Millisecond)
			}
		}
	})
	s.set(nil)
	s.other.set(nil)
	for missing := s.missing(); missing > 0; missing = s.missing() { // hundreds of runs of hang may wait
		await(t, "one more of the acknowledged tickets is stored", func() bool { return s.missing() < missing })
	}
	s.check(t)
}

// missing counts the acknowledged tickets that no monitor has stored.
func (s *soak) missing() (n int) {
	s.locked(func() {
		for ticket := range s.acked {
			if len(s.arrived[ticket]) == 0 {
				n++
			}
		}
	})
	return n
}

// ask asks for one thing at random.
func (s *soak) ask(t *testing.T, random *mathrand.Rand, n int) {
	const submit = "cmd_submit_reading"
	switch dice := random.Intn(1000); {
	case dice < 5:
		s.call(t, "-15 nan", submit, "TICKET", "hang")
	case dice < 50:
		s.call(t, "3 nan", submit, "TICKET", "fail")
	case dice < 100:
		s.call(t, "65 nan", submit, "TICKET", "text", nil)
	case dice < 150:
		s.call(t, "127 nan", submit, "TICKET", "none", "a b")
	case dice < 160:
		s.call(t, "", "cmd_update_sensor_code", "demo", "TICKET")
	case dice < 165:
		s.call(t, "", "cmd_rollback_sensor_code", "demo", "TICKET")
	case dice < 170:
		s.call(t, "", "cmd_register_new_server", "TICKET")
	case dice < 180:
		s.call(t, "", submit, "TICKET", "demo") // which may be changed twice meanwhile
	case dice < 190:
		s.call(t, "", submit, "TICKET", "picket", "uptime")
	case dice < 195:
		_, err := s.client.call(ctx, "cmd_list_sensors")
		expect(t, err == nil, "cmd_list_sensors: got %v; want no error", err)
	case dice < 200: // a caller that resets his connection
		conn := dial(t, s.client.url.Host, "")
		io.WriteString(conn, posted(string(encodeCall(submit, s.tickets.Add(1), "good"))))
		conn.SetLinger(0)
		conn.Close()
	case dice < 203: // a reload takes a second
		file, concurrency := filepath.Join(s.dir, "client.cfg"), fmt.Sprint(2+random.Intn(4))
		equal(t, "config set", picket("-c", file, "config", "set", "sensor", "concurrency", concurrency), "exit 0\n")
		s.agent.reload()
	case dice < 207:
		s.locked(func() { s.down = s.random.Intn(10) }) // the last after half a second
		total("outages of the monitor", 1)
	default:
		v := fmt.Sprintf("%d.%d", n, random.Intn(100))
		s.call(t, "0 "+v, submit, "TICKET", "good", []any{v})
	}
}

// call gives a command with a ticket of its own, of which want must come; "" is anything.
func (s *soak) call(t *testing.T, want, method string, params ...any) {
	ticket := int(s.tickets.Add(1))
	params[slices.Index(params, any("TICKET"))] = ticket
	if _, err := s.client.call(ctx, method, params...); err != nil {
		t.Errorf("%s: %v", method, err)
		return
	}
	s.locked(func() { s.acked[ticket] = want })
}

// check compares what the monitors have with what was acknowledged.
func (s *soak) check(t *testing.T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	readings := 0
	for ticket, want := range s.acked {
		got := s.arrived[ticket]
		readings += len(got)
		expect(t, len(got) <= 1 || s.lossy[ticket], "ticket %v: got it %d times; want it once", ticket, len(got))
		if want != "" {
			equal(t, fmt.Sprint("ticket ", ticket), got[0], want)
		}
	}
	total("commands acknowledged", len(s.acked))
	total("readings stored", readings)
	total("tickets with a fault of the monitor", len(s.faults))
}

// docBlocks returns the blocks of a document that are of this kind, the word behind
// their opening line.
func docBlocks(t testing.TB, file, kind string) (blocks []string) {
	t.Helper()
	for i, block := range strings.Split("\n"+string(readFile(t, file)), "\n```") {
		if text, ok := strings.CutPrefix(block, kind+"\n"); ok && i%2 == 1 {
			blocks = append(blocks, text+"\n")
		}
	}
	return blocks
}

// elsewhere counts, by document, the blocks of commands that need another box, and
// that say so in their first line.
var elsewhere = map[string]int{"README.md": 2, "docs/boxes.md": 7, "docs/tls.md": 2, "docs/monitor.md": 3}

// TestDocs runs the commands of the README and of each document as printed, in a copy
// of the source and a network of its own, and compares what they print where that
// is shown, but for numbers.
func TestDocs(t *testing.T) {
	needsRoot(t)
	busybox, unshare := needs(t, "busybox"), needs(t, "unshare")
	for _, tool := range []string{"bash", "make", "git", "curl", "openssl", "signify-openbsd"} {
		needs(t, tool)
	}
	tree := shipped(t, "")
	for _, pattern := range []string{"*.go", "docs/*", "contrib/*", "go.mod", "Makefile", "README.md"} {
		for _, name := range glob(t, pattern) {
			tree[name] = string(readFile(t, name))
		}
	}
	// As soon as one that was started in the background is waited for, both listen.
	tree["bin/sleep"] = "#!/bin/sh\nlistens() { " + busybox + " netstat -ltn | grep -q \":$1 \"; }\n" +
		"until listens 8080 && listens 8081; do " + busybox + " sleep 0.1; done\n"
	numbers := regexp.MustCompile(`[\d.]+$|[\d.]+\n`)
	for _, file := range append(glob(t, "docs/*.md"), "README.md") {
		t.Run(file, func(t *testing.T) {
			dir := t.TempDir()
			writeTree(t, dir, tree)
			if file != "README.md" {
				writeTree(t, dir, files{"picket": string(readFile(t, binary(t)))})
			}
			script := "set -e -m\n" + busybox + " ip link set lo up\nPATH=$PWD/bin:$PATH OUT=$PWD\n" +
				"git init -q; git add -A; git -c user.name=a -c user.email=a@example.org commit -qm all\n"
			others := 0
			blocks := docBlocks(t, file, "sh")
			for i, commands := range blocks {
				if strings.HasPrefix(commands, "# on ") {
					others++
				} else {
					script += fmt.Sprintf("{\n%s} >>$OUT/out.%d 2>&1\n", commands, i)
				}
			}
			equal(t, "blocks for another box", others, elsewhere[file])
			cmd := exec.Command(unshare, "--net", "--pid", "--fork", "--kill-child", "bash", "-c", script)
			cmd.Dir = dir
			p := start(t, cmd)
			select { // it builds for two boxes, perhaps with an empty cache
			case <-p.ended:
			case <-time.After(10 * patience):
			}
			code, got := p.wait(t), ""
			for i := range blocks {
				out, _ := os.ReadFile(filepath.Join(dir, fmt.Sprint("out.", i)))
				got += string(out)
			}
			expect(t, code == 0, "got exit %d: %s%s; want 0", code, &p.log, got)
			for _, want := range docBlocks(t, file, "text") {
				has(t, "the output", numbers.ReplaceAllString(got, "N\n"), numbers.ReplaceAllString(want, "N\n"))
			}
		})
	}
}

// TestTinyBox: 16 MiB are enough for the agent and its sensors, with a spool, an outage, more
// commands than it takes at once, and an update of nearly 4 MiB, which raises the peak of
// resident memory by less than 8 MiB.
func TestTinyBox(t *testing.T) {
	dir, body := t.TempDir(), make([]byte, 4<<20-100<<10) // that no compression makes smaller
	mathrand.New(mathrand.NewSource(3)).Read(body)
	writeTree(t, dir, files{"demo.tar": demoPackage(t, 1, entry("demo/data", string(body)))})
	archive := runTool(t, dir, needs(t, "bzip2"), "-9c", "demo.tar")
	public, sign := signify(t, "keynum_1")
	b := newBox(t, "[monitor]\nspool = spool\n[sensor]\npublic_key = key.pub\n", files{
		"sensors/s/check": printing(1), "key.pub": public,
		"packages/demo.tar.bz2": archive, "packages/demo.tar.bz2.sig": sign(archive),
	})
	p, limited := b.startTiny(t)
	mustCall(t, b.client, "healthcheck") // it is up
	before := residentMemory(t, p.Process.Pid, "VmHWM")
	wants(t, b.ask(t, "cmd_update_sensor_code", "demo", -1), "ticket -1: exit 0, value 1")
	after := residentMemory(t, p.Process.Pid, "VmHWM")
	expect(t, after-before <= 8<<10, "got a peak raised by %d KiB; want 8 MiB at most", after-before)
	const n = 1100
	ask := func(from int) {
		parallel(8, func(i int) {
			for k := from + i; k < from+n; k += 8 {
				_, err := b.client.call(ctx, "cmd_submit_reading", k, "s")
				expect(t, err == nil, "got %v; want no error", err)
			}
		})
	}
	b.set(away)
	ask(0)
	b.set(nil)
	ask(n)
	mustCall(t, b.client, "cmd_update_sensor_code", "demo", 2*n)
	for seen := make(map[any]bool); len(seen) < 2*n+1; {
		got := receive(t, "reading", b.readings)
		wants(t, got, fmt.Sprintf("ticket %v: exit 0, value 1", got.ticket))
		seen[got.ticket] = true
	}
	peak := residentMemory(t, p.Process.Pid, "VmHWM")
	t.Logf("peak of resident memory %d KiB before, %d after an update, %d at the end, limited: %v",
		before, after, peak, limited)
	expect(t, limited || peak <= 20<<10, "got a peak of %d KiB; want 20 MiB at most", peak)
	p.terminate(t)
}

// TestPeers: XML-RPC libraries that nobody here wrote command the agent, and
// take its readings.
func TestPeers(t *testing.T) {
	compiled, python2 := filepath.Join(t.TempDir(), "peer"), findPython2()
	const libraries = " -lxmlrpc_server_abyss -lxmlrpc_server -lxmlrpc_abyss -lxmlrpc_client" +
		" -lxmlrpc -lxmlrpc_util -lpthread"
	for name, peer := range map[string]struct{ try, command string }{ // skipped where the first does not succeed
		"python3":   {"python3 -c 1", "python3 testdata/peers/peer.py"},
		"python2.7": {python2 + " -c 1", python2 + " testdata/peers/peer.py"},
		"RPC::XML":  {"perl -MRPC::XML -e 1", "perl testdata/peers/peer.pl"},
		"xmlrpc-c":  {"cc -o " + compiled + " testdata/peers/peer.c" + libraries, compiled},
	} {
		if name == "python2.7" && python2 == "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			try := strings.Fields(peer.try)
			if out, err := exec.Command(try[0], try[1:]...).CombinedOutput(); err != nil {
				t.Skipf("%s: %v: %.200s", peer.try, err, out)
			}
			testPeer(t, strings.Fields(peer.command)...)
		})
	}
}

func testPeer(t *testing.T, command ...string) {
	peer := func(args ...string) *exec.Cmd {
		return exec.Command(command[0], append(command[1:len(command):len(command)], args...)...)
	}
	monitor := wrapped(peer("monitor"), "sh", "-c", `exec "$@" >&2`, "sh") // what it prints is its log
	input, err := monitor.StdinPipe()
	must(t, err)
	p := start(t, monitor)
	b := newBox(t, "[monitor]\ntime = utc\n", files{"sensors/words/check": "#!/bin/sh\necho $#"})
	b.configure(t, strings.Replace(b.config, b.url.Host, p.address(t), 1))
	b.run(t)
	out, err := peer("caller", b.client.url.String()).CombinedOutput()
	must(t, err)
	want := files{}
	for _, c := range cases(t, "testdata/peers/expected.txt") {
		want[c.name] = c.text
		if strings.Contains(command[0], "python") { // whose library cannot send an i8
			want[c.name] = regexp.MustCompile(`(?m)^(i8|stored i8) .*\n`).ReplaceAllString(c.text, "")
		}
	}
	equal(t, "the caller", string(out), want["caller"])
	await(t, "all readings", func() bool {
		return strings.Count(p.log.String(), "\n") > strings.Count(want["monitor"], "\n")
	})
	got := splitLines(p.log.String())[1:] // behind its address
	slices.Sort(got)
	times := regexp.MustCompile(`\d{8}T\d\d:\d\d:\d\d`)
	equal(t, "the monitor", times.ReplaceAllString(strings.Join(got, "\n"), "TIME")+"\n", want["monitor"])
	input.Close()
	equal(t, "the monitor's exit", p.wait(t), 0)
}

func FuzzINI(f *testing.F) {
	for _, file := range glob(f, "testdata/ini/*.ini") {
		f.Add(string(readFile(f, file)), "sensor", "path", "a\nb")
	}
	f.Fuzz(func(t *testing.T, text, section, option, value string) {
		c, err := parseINI("f", text)
		if err != nil {
			return
		}
		equal(t, "the text", c.text, text)
		before := dump(c) // which must end
		if err := c.set(section, option, value); err != nil {
			equal(t, "the text of what was refused", c.text, text)
			equal(t, "what was refused", dump(c), before)
			return
		}
		got, err := c.get(section, option)
		must(t, err)
		equal(t, "the value", got, value)
		again := get(parseINI("f", c.text))
		equal(t, "what reads back", dump(again), dump(c))
		must(t, c.remove(section, option))
		if _, own := c.values[iniKey{section, strings.ToLower(option)}]; own {
			t.Error("got the option still; want it removed")
		}
	})
}

// FuzzMessage: a call, a result or a fault that can be read is the same when it is written
// and read again. What is no call is a fault.
func FuzzMessage(f *testing.F) {
	for _, file := range glob(f, "testdata/xml/*.xml") {
		f.Add(readFile(f, file))
	}
	f.Add(readFile(f, "testdata/response.golden"))
	f.Add(encodeResponse(nil, faultf(1, "x")))
	f.Fuzz(func(t *testing.T, message []byte) {
		var sent *fault
		method, params, err := decodeCall(message)
		if err == nil {
			method2, params2, err := decodeCall(encodeCall(method, params...))
			equal(t, "the call", []any{method2, params2, err}, []any{method, params, nil})
		} else if !errors.As(err, &sent) {
			t.Errorf("got %v; want a fault", err)
		}
		v, err := decodeResponse(message)
		if err == nil || errors.As(err, &sent) {
			v2, err2 := decodeResponse(encodeResponse(v, err))
			equal(t, "the response", []any{v2, err2}, []any{v, err})
		}
	})
}

// FuzzSpool: whatever is in a spool's file, with the right checksums or not,
// it is read, and a reading in it is the same when it is written and read again.
func FuzzSpool(f *testing.F) {
	at := clocks{time.UnixMilli(1795633466690), 81299 * time.Second, "4b825dc6"}
	old := string(readFile(f, "testdata/spool/old"))
	for _, text := range append(strings.SplitAfter(old, "\n"), old) {
		f.Add([]byte(text), false)
	}
	unsummed := regexp.MustCompile(`(?m)^[0-9a-f]{8} `).ReplaceAllString(old, "")
	f.Add([]byte(unsummed), true)
	f.Add([]byte(strings.TrimSuffix(unsummed, "\n")), true)
	f.Fuzz(func(t *testing.T, data []byte, sum bool) {
		text := string(data)
		if sum {
			text = ""
			for _, line := range strings.Split(string(data), "\n") {
				text += withChecksum(line)
			}
		}
		found, s := parseSpool(t, text)
		lines := len(splitLines(text)) // the last, where its end is cut off, perhaps whole
		expect(t, len(found)+s.damaged <= lines, "got %d readings, %d damaged of %d lines", len(found), s.damaged, lines)
		for _, p := range found {
			again, _ := parseSpool(t, readingRecord(p, at))
			if len(again) != 1 {
				t.Fatalf("got %+v; want %+v back", again, p)
			}
			a := again[0]
			equal(t, "what reads back", []any{a.ticket, a.code, a.value, a.record}, []any{p.ticket, p.code, p.value, p.record})
		}
	})
}

func FuzzUnpack(f *testing.F) {
	for _, file := range glob(f, "testdata/packages/*") {
		f.Add(readFile(f, file))
	}
	for _, p := range packageCases(f, "testdata/packages.txt") {
		if len(p.archive) < 1<<14 {
			f.Add([]byte(p.archive))
		}
	}
	f.Add([]byte(packageOf(f, entry("demo/check", printing(1)), entry("demo/a/b/c", "d"))))
	f.Fuzz(func(t *testing.T, archive []byte) {
		dir := t.TempDir()
		u := testUpdater(t, filepath.Join(dir, "in"), nil)
		u.maxUnpacked = 1 << 16
		c := &change{updater: u, ctx: ctx, name: "demo", from: fromText(string(archive), "")}
		look := func() error {
			err := c.unpack()
			size, in := 0, filepath.Join("in/sensors", filepath.Base(c.staging.Name()))
			for name, text := range readTree(t, dir) {
				if name == filepath.Join(in, ".package") {
					continue
				}
				if size += len(text); !strings.HasPrefix(name+"/", filepath.Join(in, "demo")+"/") {
					t.Errorf("%v: got %q; want it in demo", err, name)
				}
			}
			expect(t, size <= 1<<16, "%v: got %d bytes unpacked; want 64 KiB at most", err, size)
			return nil
		}
		must(t, c.make(c.fetch, look))
	})
}

// FuzzSignify: a key or a signature that is taken holds what was taken, and
// nothing else; and only the signature itself fits the package.
func FuzzSignify(f *testing.F) {
	const message = "message"
	public, sign := signify(f, "keynum_1")
	_, key, err := parseSignify([]byte(public), ed25519.PublicKeySize)
	must(f, err)
	_, signature, err := parseSignify([]byte(sign(message)), ed25519.SignatureSize)
	must(f, err)
	for _, text := range []string{public, sign(message), sign(""), "untrusted comment: \n", ""} {
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
		_, line, _ := strings.Cut(string(text), "\n")
		line = strings.NewReplacer("\r", "", "\n", "").Replace(strings.TrimSpace(line))
		expect(t, line == want, "%q: got %q; want its second line", text, want)
		expect(t, !signed || !ed25519.Verify(key, []byte(message), data) || bytes.Equal(data, signature),
			"got %q; want %q alone to fit", data, signature)
	})
}

// BenchmarkBudgets prints the table of docs/development.md, each figure beside that of the
// yardstick in testdata/bench.
func BenchmarkBudgets(b *testing.B) {
	for i := 0; i < b.N; i++ {
		m := &bench{B: b, dir: b.TempDir()}
		m.yardstick = goBuild(b, filepath.Join(m.dir, "yardstick"), "./testdata/bench")
		m.sensor = filepath.Join(m.dir, "sensors/s/check")
		writeTree(b, m.dir, files{"sensors/s/": ""})
		runTool(b, "", needs(b, "cc"), "-Os", "-static", "-o", m.sensor, "testdata/sensor.c")
		fmt.Printf("%-58s %12s %12s %7s  %s\n", "figure", "picket", "yardstick", "ratio", "budget")
		size := func(file string) float64 { return float64(get(os.Stat(file)).Size()) / 1024 }
		sizes := []figure{{"size of the binary, KiB", "<= 1.12", size(binary(b)), size(m.yardstick)}}
		m.measure(1, func() []figure { return sizes })
		m.measure(15, m.started)
		m.measure(3, m.loaded)
		m.measure(3, m.acknowledged)
		m.measure(3, m.backlog)
	}
}

const (
	benchReadings    = 10000
	benchCallers     = 8
	benchConcurrency = 3 // runs of one sensor at once, as many as the yardstick's
)

// A bench has the programs that are measured, and a sensor.
type bench struct {
	*testing.B
	dir, yardstick, sensor string
}

// A figure is what one round has measured, and what is allowed.
type figure struct {
	what, budget      string
	picket, yardstick float64 // 0: there is none
}

// measure has figures measured in so many rounds, and prints their medians.
func (b *bench) measure(rounds int, round func() []figure) {
	all := make([][]figure, rounds)
	for i := range all {
		all[i] = round()
	}
	for k, f := range all[0] {
		var picket, yardstick []float64
		for _, figures := range all {
			picket, yardstick = append(picket, figures[k].picket), append(yardstick, figures[k].yardstick)
		}
		slices.Sort(picket)
		slices.Sort(yardstick)
		p, y, ratio := picket[rounds/2], yardstick[rounds/2], ""
		if y > 0 {
			ratio = fmt.Sprintf("%.2f", p/y)
		}
		fmt.Printf("%-58s %12.2f %12.2f %7s  %s\n", f.what, p, y, ratio, f.budget)
	}
}

// configure writes a client.cfg with a monitor and with more in it.
func (b *bench) configure(monitor, more string) (file string) {
	b.Helper()
	const config = "[monitor]\nurl = http://%s/xmlrpc/\n%s[sensor]\nconcurrency = %d\n[agent]\nlisten = 127.0.0.1:0\n"
	writeTree(b, b.dir, files{"client.cfg": fmt.Sprintf(config, monitor, more, benchConcurrency)})
	return filepath.Join(b.dir, "client.cfg")
}

// startPicket starts the agent with a monitor and with more in its client.cfg.
func (b *bench) startPicket(monitor, more string) (p *child, address string) {
	b.Helper()
	return b.start(binary(b), "-c", b.configure(monitor, more))
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

// started measures what a program takes until and while it waits for the first call.
func (b *bench) started() []figure {
	first := func(name string, args ...string) (milliseconds, resident float64) {
		begun := time.Now()
		p, address := b.start(name, args...)
		b.connect(address)(posted(string(encodeCall("healthcheck"))))
		milliseconds = float64(time.Since(begun).Microseconds()) / 1000
		b.stop(p)
		p, _ = b.start(name, args...)
		defer b.stop(p)
		time.Sleep(100 * time.Millisecond) // it is idle
		return milliseconds, float64(residentMemory(b, p.Process.Pid, "VmRSS"))
	}
	time1, size1 := first(binary(b), "-c", b.configure("127.0.0.1:1", ""))
	time2, size2 := first(b.yardstick, "listen")
	return []figure{
		{"resident memory, idle, KiB", "<= 1.15", size1, size2},
		{"from exec to first answer, ms", "<= 1.3", time1, time2},
	}
}

// loaded measures 10,000 readings that 8 callers ask for.
func (b *bench) loaded() []figure {
	m := b.monitor()
	p, address := b.startPicket(m.Addr().String(), "")
	calls, begun := submitCalls(benchReadings), time.Now()
	b.load(address, calls, 0)
	m.await(b, benchReadings)
	took := time.Since(begun)
	private := float64(residentMemory(b, p.Process.Pid, "RssAnon"))
	b.stop(p)
	begun = time.Now()
	loop := start(b, exec.Command(b.yardstick, "loop", b.sensor, fmt.Sprint(benchReadings)))
	loop.wait(b)
	rate := func(took time.Duration) float64 { return benchReadings / took.Seconds() }
	cpu := func(p *child) float64 { return p.processTime().Seconds() / benchReadings * 1e6 }
	return []figure{
		{"private memory after 10,000 readings, KiB", "<= 4608", private, 0},
		{"readings per second, two at once", ">= 0.66", rate(took), rate(time.Since(begun))},
		{"processor time per reading, children included, us", "<= 1.4", cpu(p), cpu(loop)},
	}
}

// processTime is the processor time that a program has taken, which has ended, with its children.
func (c *child) processTime() time.Duration {
	return c.ProcessState.UserTime() + c.ProcessState.SystemTime()
}

// acknowledged measures how long an acknowledgement takes under a fifth of the
// highest load.
func (b *bench) acknowledged() []figure {
	const n, rate = 2400, 300
	m := b.monitor()
	p, address := b.startPicket(m.Addr().String(), "")
	picket := b.load(address, submitCalls(n), rate)
	m.await(b, n)
	b.stop(p)
	p, address = b.start(b.yardstick, "serve", b.sensor)
	yardstick := b.load(address, submitCalls(n), rate)
	b.stop(p)
	return []figure{{"acknowledgement, 99th percentile at 300 a second, us", "<= 2.0", picket, yardstick}}
}

// backlog measures how fast readings go out that had to wait for the monitor,
// from the first that arrives to the last.
func (b *bench) backlog() []figure {
	m, spool := b.monitor(), filepath.Join(b.dir, "spool")
	m.away.Store(true)
	p, address := b.startPicket(m.Addr().String(), "spool = spool\nspool_size = 4M\n")
	b.load(address, submitCalls(benchReadings), 0)
	await(b, "all are in the spool", func() bool { return strings.Count(spoolText(b, spool), " r ") >= benchReadings })
	m.away.Store(false)
	picket := m.await(b, benchReadings)
	b.stop(p)
	must(b, os.RemoveAll(spool))
	m = b.monitor()
	body := string(encodeCall("cmd_store_probe_data", 12345, []any{0, "42"}, dateTime("20261122T20:43:21")))
	url := "http://" + m.Addr().String() + "/xmlrpc/"
	p = start(b, exec.Command(b.yardstick, "send", url, fmt.Sprint(benchReadings), body))
	yardstick := m.await(b, benchReadings)
	p.wait(b)
	return []figure{{"a backlog of 10,000 readings, per second", ">= 0.6", picket, yardstick}}
}

// submitCalls returns so many requests that ask for a reading.
func submitCalls(n int) []string {
	calls := make([]string, n)
	for i := range calls {
		calls[i] = posted(string(encodeCall("cmd_submit_reading", i, "s")))
	}
	return calls
}

// load has 8 callers ask for readings, at so many a second (0: as fast as it goes), and
// returns the 99th percentile of how long an answer took, in microseconds.
func (b *bench) load(address string, calls []string, rate float64) float64 {
	n := len(calls)
	took := make([]float64, n)
	parallel(benchCallers, func(i int) {
		exchange, begun := b.connect(address), time.Now()
		for k := i; k < n; k += benchCallers {
			if rate > 0 {
				time.Sleep(time.Until(begun.Add(time.Duration(float64(k) / rate * 1e9))))
			}
			sent := time.Now()
			exchange(calls[k])
			took[k] = float64(time.Since(sent).Nanoseconds()) / 1000
		}
	})
	slices.Sort(took)
	return took[n*99/100]
}

// connect connects, and returns a function that sends a request and reads the answer.
func (b *bench) connect(address string) (exchange func(request string)) {
	conn := dial(b, address, "")
	conn.SetDeadline(time.Time{})
	r := bufio.NewReader(conn)
	return func(request string) {
		io.WriteString(conn, request) // a loss shows in the answer
		line, err := readMessage(r)
		if err != nil || !strings.Contains(line, " 200 ") {
			b.Errorf("got %q, %v; want status 200", line, err)
		}
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

// A wireMonitor counts the readings that it takes, and takes little of the processor.
type wireMonitor struct {
	net.Listener
	away   atomic.Bool
	stored chan struct{}
}

func (b *bench) monitor() *wireMonitor {
	m := &wireMonitor{stored: make(chan struct{}, 2*benchReadings)}
	const answer = "HTTP/1.1 %s\r\nContent-Type: text/xml\r\nContent-Length: %d\r\n\r\n%s"
	body := encodeResponse(true, nil)
	yes, no := fmt.Sprintf(answer, "200 OK", len(body), body), fmt.Sprintf(answer, "503 Service Unavailable", 0, "")
	m.Listener = listenRaw(b, "127.0.0.1:0", func(conn net.Conn) {
		for r := bufio.NewReader(conn); ; {
			if _, err := readMessage(r); err != nil {
				return
			}
			if m.away.Load() {
				io.WriteString(conn, no)
				continue
			}
			io.WriteString(conn, yes)
			m.stored <- struct{}{}
		}
	})
	return m
}

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
