package main

// The settings and the file that they come from: client.cfg, an INI text in
// the dialect of Python 2.7's SafeConfigParser, because the files on the boxes
// were written for it:
//
//	[DEFAULT]
//	root: /opt/picket
//	[sensor]
//	path = %(root)s/sensors   ; the value ends before the semicolon
//	[agent]
//	allow = 10.0.0.5,
//	  192.168.1.0/24
//
// A key and its value are split at the first ':' or '='. Keys are lower-cased,
// sections are not. An indented line continues the value above it. A comment
// begins with ';' or '#' at the start of a line or after white space, and a
// line whose first word is rem is one. Sections of the same name merge, and the
// last of duplicate keys wins. %(name)s stands for another value of the section
// or of [DEFAULT], %% for a percent sign. Unlike Python, picket allows a comment
// to be indented, skips a byte-order mark, and keeps order and comments.
//
// This file reads, changes and saves that text, and makes typed settings of
// it. It knows nothing of sensors or of the wire.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	maxConfig    = 1 << 20          // bytes of client.cfg or a certificate: far more than one needs
	maxExpanded  = 64 << 10         // bytes and references of one value: ten levels could make 10^10
	maxReference = 10               // levels of %(name)s, as in Python
	maxBadLines  = 20               // reported one by one: a file that is no INI at all has thousands
	maxTimeout   = time.Hour        // of a sensor, which takes the place of others for so long
	editTime     = 10 * time.Second // for which a change of client.cfg waits for others
	iniSpace     = " \t\n\r\v\f"
	byteMark     = "\xef\xbb\xbf"
	defaults     = "DEFAULT" // the section that the others inherit from
)

// An iniKey names an option or, without one, a section.
type iniKey struct{ section, option string }

// An ini is an INI text. A change of it keeps every byte of all other lines.
type ini struct {
	name   string // of the file, for errors
	text   string
	keys   []iniKey          // the section or option that each line belongs to; a comment has none
	last   iniKey            // of the last line that is no comment
	line   map[iniKey]int    // the number of the line at which a section or option stands
	values map[iniKey]string // of the options, before interpolation
}

// parseINI reads an INI text. Its error lists the first twenty bad lines, each as
// "name:line: what is wrong". It quotes none: there may be a password in it.
func parseINI(name, text string) (*ini, error) {
	c := &ini{name: name, text: text, line: make(map[iniKey]int), values: make(map[iniKey]string)}
	if before, _, found := strings.Cut(text, "\x00"); found {
		line := 1 + strings.Count(before, "\n")
		return c, fmt.Errorf("%s:%d: a NUL byte: the text, or a part of it, is UTF-16; save it as UTF-8", name, line)
	}
	var errs []error
	for i, line := range strings.SplitAfter(strings.TrimPrefix(text, byteMark), "\n") {
		if err := c.add(i+1, line); err != nil && len(errs) < maxBadLines {
			errs = append(errs, fmt.Errorf("%s:%d: %w", name, i+1, err))
		}
	}
	return c, errors.Join(errs...)
}

// add reads line n, which belongs to the section and, if indented, to the option above it.
func (c *ini) add(n int, line string) error {
	trimmed := strings.Trim(line, iniSpace)
	word := trimmed[:strings.IndexAny(trimmed+" ", iniSpace)]
	indented := trimmed != "" && line[0] != trimmed[0]
	if trimmed == "" || strings.IndexByte("#;", trimmed[0]) >= 0 || !indented && strings.EqualFold(word, "rem") {
		c.keys = append(c.keys, iniKey{})
		return nil
	}
	bracket, separator := strings.Index(line, "]"), strings.IndexAny(line, ":=")
	switch {
	case indented && c.last.option != "":
		_, value, _ := splitLine(line, strings.Index(line, trimmed))
		c.values[c.last] += "\n" + value
	case strings.HasPrefix(line, "[") && bracket > 1:
		c.last = iniKey{section: line[1:bracket]}
		c.line[c.last] = n
	case c.last.section == "":
		return errors.New("no section header yet")
	case indented:
		return errors.New("an indented line with no option to continue")
	case separator < 1:
		return errors.New("neither a section, an option nor a comment")
	default:
		c.last.option = strings.ToLower(strings.TrimRight(line[:separator], iniSpace))
		_, value, _ := splitLine(line, separator+1)
		if value == `""` {
			value = "" // how the old files write an empty value
		}
		c.line[c.last], c.values[c.last] = n, value
	}
	c.keys = append(c.keys, c.last)
	return nil
}

// splitLine finds the value in a line. The value begins after the first n bytes and the
// blanks there, and ends before a comment. If it is empty, the blanks come behind it.
func splitLine(text string, n int) (before, value, behind string) {
	from, end := len(text)-len(strings.TrimLeft(text[n:], " \t\v\f")), len(text)
	for i := from; i < end; i++ {
		if strings.IndexByte(";#", text[i]) >= 0 && strings.IndexByte(iniSpace, text[i-1]) >= 0 {
			end = i
		}
	}
	if value = strings.TrimRight(text[from:end], iniSpace); value == "" {
		from = n
	}
	return text[:from], value, text[from+len(value):]
}

// locate returns where an option of a section stands: there, in [sensor] for a
// section [sensor NAME], or in DEFAULT. One that is not set would stand there.
func (c *ini) locate(section, option string) iniKey {
	kind := section
	if sensorOf(section) != "" {
		kind = "sensor"
	}
	for _, place := range []string{section, kind, defaults} {
		if key := (iniKey{place, strings.ToLower(option)}); c.line[key] > 0 {
			return key
		}
	}
	return iniKey{section, strings.ToLower(option)}
}

// get returns an option's value with every %(name)s filled in, or the default of one that is not set.
func (c *ini) get(section, option string) (string, error) {
	key := c.locate(section, option)
	for _, o := range known {
		inherits := o.section == "sensor" && sensorOf(section) != ""
		if c.line[key] == 0 && o.name == key.option && (o.section == section || inherits) {
			return o.value, nil
		}
	}
	var b strings.Builder
	left := maxExpanded
	err := c.expand(&b, &left, section, key.option, 0)
	return b.String(), err
}

// expand appends a value to b, with its references filled in. left is how many bytes and
// references may still come, and depth how many references led here.
func (c *ini) expand(b *strings.Builder, left *int, section, option string, depth int) error {
	raw, ok := c.values[c.locate(section, option)]
	switch {
	case depth > maxReference:
		return fmt.Errorf("references nested deeper than %d levels, or in a circle", maxReference)
	case !ok && option == "__name__": // as in Python 2
		raw = strings.ReplaceAll(section, "%", "%%")
	case !ok:
		return fmt.Errorf("there is no option %q in [%s]", option, section)
	}
	for {
		before, rest, found := strings.Cut(raw, "%")
		b.WriteString(before)
		if *left -= 1 + len(before); *left < 0 {
			return fmt.Errorf("longer than %d bytes when filled in", maxExpanded)
		}
		end := strings.Index(rest, ")")
		switch {
		case !found:
			return nil
		case strings.HasPrefix(rest, "%"):
			b.WriteByte('%')
			raw = rest[1:]
		case !strings.HasPrefix(rest, "(") || end < 2 || !strings.HasPrefix(rest[end:], ")s"):
			return errors.New("bad interpolation: %(name)s is a reference, %% a percent sign")
		default:
			if err := c.expand(b, left, section, strings.ToLower(rest[1:end]), depth+1); err != nil {
				return err
			}
			raw = rest[end+2:]
		}
	}
}

// set gives an option a value, and get returns exactly that: a percent sign is
// written %%, a newline as a continuation line. The value is replaced where it
// stands, and its comment stays. A missing option is added after the last one
// of its section, a missing section at the end. A value or name that would not
// read back the same is refused and changes nothing.
func (c *ini) set(section, option, value string) error {
	key := iniKey{section, strings.ToLower(option)}
	raw := strings.ReplaceAll(value, "%", "%%")
	lines, eol := strings.SplitAfter(c.text, "\n"), "\n"
	if strings.HasSuffix(lines[0], "\r\n") {
		eol = "\r\n"
	}
	first, _, _ := strings.Cut(raw, "\n")
	more := strings.ReplaceAll(raw[len(first):], "\n", eol+"\t")
	if n := c.line[key]; n > 0 {
		text := strings.TrimRight(lines[n-1], "\r\n")
		before, old, comment := splitLine(text, strings.IndexAny(text, ":=")+1)
		if old == "" {
			before += " " // "key =" becomes "key = value"
		}
		end := lines[n-1][len(text):] // the last line may have none
		if more != "" {
			end = eol
		}
		lines[n-1] = before + first + comment + more + end
		for i := n; i < len(lines); i++ {
			if c.keys[i] == key { // it continues the old value
				lines[i] = ""
			}
		}
	} else {
		end, header, above := len(lines), "["+section+"]"+eol, "\n"+eol // a new section has a blank line above it
		for i := range lines {
			if c.keys[i].section == section {
				end, header, above = i+1, "", "\n"
			}
		}
		for text := strings.Join(lines[:end], ""); text != "" && !strings.HasSuffix(text, above); text += eol {
			header = eol + header
		}
		lines = slices.Insert(lines, end, header+key.option+" = "+first+more+eol)
	}
	want := maps.Clone(c.values)
	want[key] = raw
	next, err := parseINI(c.name, strings.Join(lines, ""))
	if err != nil || !maps.Equal(next.values, want) {
		return fmt.Errorf("set %.80q of [%.80s]: it cannot be written so that it reads back the same", option, section)
	}
	*c = *next
	return nil
}

// remove removes an option from its section or, without one, the whole section.
// Comments stay. A value in DEFAULT shows through again.
func (c *ini) remove(section string, option ...string) error {
	lines, found := strings.SplitAfter(c.text, "\n"), false
	for i, key := range c.keys {
		if key.section == section && (len(option) == 0 || option[0] != "" && key.option == strings.ToLower(option[0])) {
			lines[i], found = "", true
		}
	}
	if !found || section == "" { // comments have no section
		what := strings.TrimSpace("[" + section + "] " + strings.Join(option, ""))
		return fmt.Errorf("%s: there is no %s in it", c.name, what)
	}
	next, err := parseINI(c.name, strings.Join(lines, ""))
	if err == nil {
		*c = *next
	}
	return err
}

// settings holds what client.cfg says, checked and typed. Paths are absolute.
type settings struct {
	file                           string // client.cfg itself; "" where there is none
	executable, help, path, backup string
	timeout                        time.Duration
	concurrency                    int
	user                           sensorUser
	update                         bool
	maxPackage, maxUnpacked        int64  // bytes
	publicKey                      string // a file or directory, which need not be there
	keep                           int
	own                            map[string]*ownSettings // of single sensors, by name

	monitor        *url.URL
	monitorTimeout time.Duration
	utc            bool
	noValue        string
	spool          string // a directory; "" where readings are in memory alone
	spoolSize      int64  // bytes
	monitorTLS     tlsFiles

	listen   string
	allow    []netip.Prefix // callers that may command the agent; empty: everybody
	agentTLS tlsFiles
	queue    int
	syslog   bool
	verbose  bool // each command and reading is logged
}

// protections returns which protections are in force, by the options that make them. It
// names the users of the sensors that have own settings in s or in other.
func (s *settings) protections(other *settings) map[string]bool {
	inForce := map[string]bool{
		"[sensor] user":        s.user.credential != nil,
		"[sensor] update = no": !s.update,
		"[sensor] public_key":  s.publicKey != "",
		"[monitor] ca":         s.monitorTLS.ca != "",
		"[agent] allow":        len(s.allow) > 0,
		"[agent] certificate":  s.agentTLS.certificate != "",
		"[agent] client_ca":    s.agentTLS.ca != "",
		"[agent] client_name":  s.agentTLS.name != "",
	}
	for name := range other.own {
		inForce["[sensor "+name+"] user"] = s.user.credential != nil
	}
	for name, own := range s.own {
		inForce["[sensor "+name+"] user"] = own.user.credential != nil
	}
	return inForce
}

// lost names the protections in force in s that next lacks. One with another value is not lost.
func (s *settings) lost(next *settings) []string {
	now, then := s.protections(next), next.protections(s)
	maps.DeleteFunc(now, func(name string, inForce bool) bool { return !inForce || then[name] })
	return sortedKeys(now)
}

// longest returns the longest time-out of a sensor.
func (s *settings) longest() time.Duration {
	d := s.timeout
	for _, own := range s.own {
		d = max(d, own.timeout)
	}
	return d
}

// tlsFiles holds the files that a section names for TLS, and what is in them.
type tlsFiles struct {
	certificate, key, ca string // "" where there is none
	name                 string // that the peer's certificate must bear; "": any
	pair                 *tls.Certificate
	pool                 *x509.CertPool
}

// load reads the files. With an error it returns the option that is to blame.
func (t *tlsFiles) load() (option string, err error) {
	switch {
	case t.certificate != "" && t.key == "":
		return "certificate", errors.New("needs a key")
	case t.key != "" && t.certificate == "":
		return "key", errors.New("needs a certificate")
	}
	var texts [3][]byte
	for i, file := range []string{t.certificate, t.key, t.ca} {
		if file == "" {
			continue
		}
		if texts[i], err = readSmall(file, maxConfig); err != nil {
			return []string{"certificate", "key", "ca"}[i], err
		}
	}
	if t.certificate != "" {
		pair, err := tls.X509KeyPair(texts[0], texts[1])
		if err != nil {
			return "certificate", fmt.Errorf("%s: %w", t.certificate, err)
		}
		t.pair = &pair
	}
	if t.ca != "" {
		t.pool = x509.NewCertPool()
		if !t.pool.AppendCertsFromPEM(texts[2]) {
			return "ca", fmt.Errorf("no certificate in %s", t.ca)
		}
	}
	return "", nil
}

// An option is one option of client.cfg.
type option struct {
	section, name, value string             // the value is the default
	set                  func(string) error // checks a value and stores it
}

// options lists every option of client.cfg, also those of each [sensor NAME], to be stored in s.
// Relative paths start from its directory. An option that has a default must not be empty.
func (c *ini) options(s *settings) []option {
	path := func(v string) (string, error) {
		if v != "" && !filepath.IsAbs(v) {
			v = filepath.Join(filepath.Dir(c.name), v)
		}
		return filepath.Join(v), nil // cleaned, and "" where there is none
	}
	text := func(v string) (string, error) { return v, nil }
	list := []option{
		{"sensor", "executable", "check", store(&s.executable, plainElement)},
		{"sensor", "help", "options", store(&s.help, text)},
		{"sensor", "path", "sensors/", store(&s.path, path)},
		{"sensor", "backup", "sensors_backup/", store(&s.backup, path)},
		{"sensor", "timeout", "30s", store(&s.timeout, duration(maxTimeout))},
		{"sensor", "concurrency", "4", store(&s.concurrency, number(1, 64))},
		{"sensor", "user", "", store(&s.user, otherUser)},
		{"sensor", "update", "yes", store(&s.update, yesOrNo)},
		{"sensor", "keep", "3", store(&s.keep, number(0, 1000))},
		{"sensor", "public_key", "", store(&s.publicKey, path)},
		{"sensor", "max_package", "4M", store(&s.maxPackage, number[int64](1, 1<<40))},
		{"sensor", "max_unpacked", "16M", store(&s.maxUnpacked, number[int64](1, 1<<40))},
		{"monitor", "url", "http://localhost:8081/xmlrpc/", store(&s.monitor, httpURL)},
		{"monitor", "timeout", "15s", store(&s.monitorTimeout, duration(math.MaxInt64))},
		{"monitor", "time", "local", store(&s.utc, secondOf("local", "utc"))},
		{"monitor", "no_value", "nan", store(&s.noValue, floatText)},
		{"monitor", "spool", "", store(&s.spool, path)},
		{"monitor", "spool_size", "1M", store(&s.spoolSize, number[int64](64<<10, 4<<20))},
		{"monitor", "ca", "", store(&s.monitorTLS.ca, path)},
		{"monitor", "certificate", "", store(&s.monitorTLS.certificate, path)},
		{"monitor", "key", "", store(&s.monitorTLS.key, path)},
		{"agent", "listen", ":8080", store(&s.listen, address)},
		{"agent", "allow", "", store(&s.allow, networks)},
		{"agent", "certificate", "", store(&s.agentTLS.certificate, path)},
		{"agent", "key", "", store(&s.agentTLS.key, path)},
		{"agent", "client_ca", "", store(&s.agentTLS.ca, path)},
		{"agent", "client_name", "", store(&s.agentTLS.name, text)},
		{"agent", "queue", "256", store(&s.queue, number(1, 65536))},
		{"agent", "log", "stderr", store(&s.syslog, secondOf("stderr", "syslog"))},
		{"agent", "verbose", "no", store(&s.verbose, yesOrNo)},
	}
	s.own = make(map[string]*ownSettings)
	for _, key := range c.keys {
		if name := sensorOf(key.section); name != "" && s.own[name] == nil {
			own := &ownSettings{}
			s.own[name] = own
			list = append(list, option{key.section, "timeout", "30s", store(&own.timeout, duration(maxTimeout))},
				option{key.section, "user", "", store(&own.user, otherUser)})
		}
	}
	return list
}

// known lists the options for whoever needs their names and defaults only.
var known = new(ini).options(new(settings))

// ownSettings holds the settings of one sensor, from its section [sensor NAME] or from [sensor].
type ownSettings struct {
	timeout time.Duration
	user    sensorUser
}

// sensorOf returns the NAME of a section [sensor NAME], "" for any other section.
func sensorOf(section string) string {
	name, found := strings.CutPrefix(section, "sensor ")
	_, err := plainElement(name)
	if !found || err != nil || name == "" || name[0] == '.' || strings.TrimSpace(name) != name {
		return ""
	}
	return name
}

// optionsOf lists the options that a section can have. DEFAULT can have all, an unknown section none.
func optionsOf(section string) (names []string) {
	if sensorOf(section) != "" {
		return []string{"timeout", "user"}
	}
	for _, o := range known {
		if section == o.section || section == defaults {
			names = append(names, o.name)
		}
	}
	return names
}

// store returns a function that stores what a check returns.
func store[T any](to *T, check func(string) (T, error)) func(string) error {
	return func(v string) (err error) {
		*to, err = check(v)
		return err
	}
}

// A finding is something in client.cfg that is not as it should be.
type finding struct {
	at    iniKey // the option or section
	file  string
	line  int    // 0 for an option that does not stand there
	text  string // shows no password
	grave int
}

// How grave a finding is.
const (
	remark  = iota // a warning
	mistake        // the agent starts and warns; picket config and config set refuse it
	wrong          // the agent does not start
)

func (f finding) String() string {
	if f.line == 0 {
		return f.file + ": " + f.text
	}
	return fmt.Sprintf("%s:%d: %s", f.file, f.line, f.text)
}

// A tolerated error is a mistake: it comes with a value that the agent can use.
type tolerated struct{ error }

// finding makes a finding of an error in an option, at the line where the option stands.
func (c *ini) finding(section, name string, err error) finding {
	key := c.locate(section, name)
	grave := wrong
	if errors.As(err, new(tolerated)) {
		grave = mistake
	}
	return finding{key, c.name, c.line[key], masked(fmt.Sprintf("[%s] %s: %v", key.section, key.option, err)), grave}
}

// settings checks all options. The findings are in the order of the file, one for
// each option. The settings can be used if none of them is wrong.
func (c *ini) settings() (s *settings, found []finding) {
	s = &settings{file: c.name}
	report := func(section, name string, err error) {
		f := c.finding(section, name, err)
		same := func(other finding) bool { return other.at == f.at && other.grave >= f.grave }
		if err != nil && !slices.ContainsFunc(found, same) {
			found = append(found, f)
		}
	}
	for _, o := range c.options(s) {
		value, err := c.get(o.section, o.name)
		switch {
		case err != nil:
		case value == "" && o.value != "":
			err = errors.New("a value is needed")
		default:
			err = o.set(value)
		}
		if n := len(value) - 1; n > 0 && strings.IndexByte(`"'`, value[0]) >= 0 && value[n] == value[0] {
			quotes := errors.New("the quotes around it are taken for a part of it: leave them out")
			if err == nil || errors.As(err, new(tolerated)) {
				quotes = tolerated{quotes}
			}
			err = quotes
		}
		report(o.section, o.name, err)
	}
	if s.path == s.backup {
		report("sensor", "backup", errors.New("the same directory as path"))
	}
	blamed, err := s.monitorTLS.load()
	report("monitor", blamed, err)
	if blamed, err = s.agentTLS.load(); blamed == "ca" {
		blamed = "client_ca"
	}
	report("agent", blamed, err)
	if s.agentTLS.ca != "" && s.agentTLS.certificate == "" { // it would check nobody
		report("agent", "client_ca", errors.New("needs certificate and key"))
	}
	if s.agentTLS.name != "" && s.agentTLS.ca == "" {
		report("agent", "client_name", errors.New("needs client_ca"))
	}
	found = append(found, c.strangers()...)
	slices.SortStableFunc(found, func(a, b finding) int { return a.line - b.line })
	return s, found
}

// strangers finds the sections and options that picket does not know. An option of DEFAULT,
// or one that a value refers to, is the user's own unless its name is near a known one.
func (c *ini) strangers() (found []finding) {
	all := strings.ToLower(c.text)
	for key := range c.line {
		text, grave := unknown(key.section, key.option)
		isOwn := grave == remark && (key.section == defaults || strings.Contains(all, "%("+key.option+")"))
		if text != "" && (key.option == "" || !isOwn && optionsOf(key.section) != nil) {
			found = append(found, finding{key, c.name, c.line[key], masked(text), grave})
		}
	}
	return found
}

// unknown returns what is to be said of an option that picket does not know or, without a name,
// of such a section. It returns "" for a known one. Near a known name it is a mistake.
func unknown(section, name string) (text string, grave int) {
	names := optionsOf(section)
	switch {
	case section == "sensor picket" && name == "":
		return "[sensor picket] has no effect: the agent itself answers to that name", remark
	case names != nil && (name == "" || slices.Contains(names, strings.ToLower(name))):
		return "", remark
	}
	text, near := fmt.Sprintf("unknown option %q in [%s]", name, section), nearest(name, names)
	if names == nil {
		text = fmt.Sprintf("unknown section [%s]", section)
		first, _, more := strings.Cut(section, " ")
		if near = nearest(first, []string{defaults, "sensor", "monitor", "agent"}); near == "sensor" && more {
			near = "sensor NAME"
		}
	}
	if near == "" {
		return text, remark
	}
	return fmt.Sprintf("%s (did you mean %q?)", text, near), mistake
}

// nearest returns the name that was probably meant, or "". It differs in one letter, in two
// neighbours that are swapped or, if it has more than four letters, in any two neighbours.
func nearest(name string, names []string) string {
	for _, n := range names {
		a, b := strings.ToLower(name), strings.ToLower(n)
		for a != "" && b != "" && a[0] == b[0] {
			a, b = a[1:], b[1:]
		}
		for a != "" && b != "" && a[len(a)-1] == b[len(b)-1] {
			a, b = a[:len(a)-1], b[:len(b)-1]
		}
		swapped := len(a) == 2 && len(b) == 2 && a[0] == b[1] && a[1] == b[0]
		if differ := max(len(a), len(b)); differ < 2 && differ < len(n) || differ == 2 && (len(n) > 4 || swapped) {
			return n
		}
	}
	return ""
}

// The checks of single values. Each returns the cleaned value.

// plainElement takes one plain path element.
func plainElement(v string) (string, error) {
	if v == "." || v == ".." || strings.ContainsAny(v, "/\x00") {
		return "", fmt.Errorf("%q is not a file name", v)
	}
	return v, nil
}

// networks reads addresses and networks with commas between them:
// 192.168.1.0/24, 10.0.0.5, fd00::/8. IPv4 in IPv6 counts as IPv4.
func networks(v string) (list []netip.Prefix, err error) {
	if v == "" {
		return nil, nil
	}
	for _, part := range strings.Split(v, ",") {
		part = strings.TrimSpace(part)
		prefix, err := netip.ParsePrefix(part)
		if addr, err2 := netip.ParseAddr(part); err2 == nil && addr.Zone() == "" {
			prefix, err = addr.Prefix(addr.BitLen())
		}
		if addr := prefix.Addr(); addr.Is4In6() && prefix.Bits() >= 96 {
			prefix = netip.PrefixFrom(addr.Unmap(), prefix.Bits()-96)
		}
		if err != nil || prefix.Addr().Is4In6() {
			return nil, fmt.Errorf("%q is neither an address nor a network such as 192.168.1.0/24", part)
		}
		list = append(list, prefix.Masked())
	}
	return list, nil
}

// secondOf takes a word of some pairs, in capitals or not, and reports if it is the second of its pair.
func secondOf(pairs ...string) func(string) (bool, error) {
	return func(v string) (bool, error) {
		i := slices.Index(pairs, strings.ToLower(v))
		if i < 0 {
			return false, fmt.Errorf("%q is neither %s nor %s", v, pairs[0], pairs[1])
		}
		return i%2 == 1, nil
	}
}

// yesOrNo takes yes, no and the other words that Python takes for them.
var yesOrNo = secondOf("no", "yes", "false", "true", "off", "on", "0", "1")

// number takes a whole number from low to high. A size may be written as 64K, 4M or 1G.
func number[T int | int64](low, high T) func(string) (T, error) {
	return func(v string) (T, error) {
		digits := strings.TrimRight(v, "KMGkmg")
		shift, ok := map[string]int{"": 0, "K": 10, "M": 20, "G": 30}[strings.ToUpper(v[len(digits):])]
		n, err := strconv.ParseUint(digits, 10, 63)
		if err != nil || !ok || n > uint64(high)>>shift || T(n)<<shift < low {
			return 0, fmt.Errorf("%q is not a whole number from %d to %d; K, M or G may follow it", v, low, high)
		}
		return T(n) << shift, nil
	}
}

// duration takes 30 (seconds), 30s, 5m or 1h30m, more than zero. A time longer than most
// becomes most: earlier versions took it, so the agent must start all the same.
func duration(most time.Duration) func(string) (time.Duration, error) {
	return func(v string) (time.Duration, error) {
		text := v
		if _, err := strconv.ParseFloat(v, 64); err == nil {
			text += "s"
		}
		d, err := time.ParseDuration(text)
		if err != nil || d <= 0 {
			return 0, fmt.Errorf("%q is not a time such as 30, 30s or 5m", v)
		}
		if d > most {
			return most, tolerated{fmt.Errorf("%v is too long, %v is used", d, most)}
		}
		return d, nil
	}
}

// floatText takes what a monitor's float() takes.
func floatText(v string) (string, error) {
	f, err := strconv.ParseFloat(v, 64)
	if err != nil || math.IsInf(f, 0) || strings.ContainsAny(v, "xX_") {
		return "", fmt.Errorf("%q is neither nan nor a number", v)
	}
	return v, nil
}

// address takes host:port, or :port for every address of the box.
func address(v string) (string, error) {
	_, port, err := net.SplitHostPort(v)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return "", fmt.Errorf("%q is not an address such as :8080 or 127.0.0.1:8080", v)
	}
	return v, nil
}

// httpURL takes the URL of an XML-RPC endpoint: http or https, with a host. Its
// errors do not quote it, as there may be a password in it. A '#', '/' or '?' in a
// password ends the name of the host, and the rest would go to a wrong one: such a URL
// is an error, though tolerated, as an agent must start with it. If it is a '#', the
// URL that is returned has a fragment, and a client sends nothing to it.
func httpURL(v string) (*url.URL, error) {
	v, fragment, hasFragment := strings.Cut(v, "#")
	if at := strings.LastIndex(fragment, "@"); at >= 0 {
		return &url.URL{Scheme: "http", Host: "xxxxx", Fragment: fragment[at:]}, tolerated{errors.New(
			"nothing is sent to this URL, as # begins a fragment: write # as %23, in client.cfg %%23")}
	}
	u, err := url.Parse(v)
	if err != nil {
		return nil, errors.New("not a URL such as http://monitor:8081/xmlrpc/")
	}
	port, errPort := strconv.ParseUint(u.Port(), 10, 16)
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("this is neither an http nor an https URL")
	case u.Hostname() == "":
		return nil, errors.New("this URL names no host")
	case strings.ContainsFunc(u.Host, func(r rune) bool { return r >= 0x80 }):
		return nil, errors.New("write the host in ASCII, as xn--... if its name has other letters")
	case u.Port() != "" && (errPort != nil || port == 0):
		return nil, errors.New("this URL has a port that does not exist")
	case hasFragment:
		err = tolerated{errors.New("the fragment of this URL is left out: write # as %23, in client.cfg %%23")}
	case u.User == nil && strings.Contains(u.RequestURI(), "@"):
		err = tolerated{errors.New("this URL has an @ behind its host: in a password write / as %2F and ? as %3F, " +
			"in client.cfg %%2F and %%3F; elsewhere write @ as %40")}
	}
	u.RawQuery = strings.ReplaceAll(u.RawQuery, " ", "%20")
	return u, err
}

// masked hides passwords: in each line everything between :// and the last @ becomes
// xxxxx. (A URL that was taken for a path has only :/.)
func masked(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		before, rest, found := strings.Cut(line, ":/")
		if at := strings.LastIndex(rest, "@"); found && at >= 0 {
			lines[i] = before + "://xxxxx" + rest[at:]
		}
	}
	return strings.Join(lines, "\n")
}

// redacted hides the password in a value of client.cfg, even in a URL that is broken.
func redacted(value string) string {
	at := strings.LastIndex(value, "@")
	if at < 0 || !strings.Contains(value[:at], ":") {
		return value
	}
	scheme, _, found := strings.Cut(value[:at], "://")
	if !found {
		return "xxxxx" + value[at:]
	}
	return scheme + "://xxxxx" + value[at:]
}

// A sensorUser is the user that sensors run as.
type sensorUser struct {
	credential *syscall.Credential // nil: the user who runs the agent
	env        []string            // what his sensors have in their environment
}

// otherUser finds the user, by name or number, that sensors run as, and his
// groups. It returns no credential for the user who runs the agent, unless that is root:
// only root can run sensors as another user. A number that /etc/passwd does not
// know is taken as it is, with a group of the same number and / as home.
func otherUser(v string) (none sensorUser, err error) {
	if v == "" {
		return none, nil
	}
	u, err := user.Lookup(v)
	if _, notNumber := strconv.ParseUint(v, 10, 32); err != nil && notNumber == nil {
		if u, err = user.LookupId(v); err != nil {
			u, err = &user.User{Uid: v, Gid: v, Username: v, HomeDir: "/"}, nil
		}
	}
	if err != nil {
		return none, fmt.Errorf("no user %q: %w", v, err)
	}
	groups, err := u.GroupIds()
	if err != nil && !errors.Is(err, os.ErrNotExist) { // a box need not have /etc/group
		return none, fmt.Errorf("groups of user %q: %w", v, err)
	}
	var ids []uint32
	for _, text := range append([]string{u.Uid, u.Gid}, groups...) {
		id, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return none, fmt.Errorf("user %q: %w", v, err)
		}
		ids = append(ids, uint32(id))
	}
	switch euid := os.Geteuid(); {
	case euid != 0 && int(ids[0]) == euid:
		return none, nil
	case euid != 0:
		return none, errors.New("only root can run sensors as another user")
	}
	credential := &syscall.Credential{Uid: ids[0], Gid: ids[1], Groups: ids[2:]}
	return sensorUser{credential, []string{"HOME=" + u.HomeDir, "USER=" + u.Username, "LOGNAME=" + u.Username}}, nil
}

// readINI reads and parses a file of at most 1 MiB.
func readINI(file string) (c *ini, err error) {
	text, err := readSmall(file, maxConfig)
	if err == nil {
		c, err = parseINI(file, string(text))
	}
	if err != nil {
		return nil, usagef("%w", err)
	}
	return c, nil
}

// readSmall reads a regular file of at most limit bytes.
func readSmall(file string, limit int64) ([]byte, error) {
	f, err := openRegular(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s: larger than %d bytes", file, limit)
	}
	return data, err
}

// openRegular opens a regular file for reading. It opens nothing else: a FIFO
// would keep it waiting, and a device may do something when it is opened.
func openRegular(file string) (f *os.File, err error) {
	info, err := os.Stat(file)
	if err == nil && info.Mode().IsRegular() {
		if f, err = os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0); err == nil {
			info, err = f.Stat() // it may have been exchanged
		}
	}
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: not a regular file", file)
	}
	if err != nil {
		f.Close() // a nil file does not mind
		return nil, err
	}
	return f, nil
}

// exists reports whether there is anything with this name.
func exists(file string) bool {
	_, err := os.Lstat(file)
	return err == nil
}

// editINI reads a file, lets change alter the text, and saves it if that is now another. If
// anything fails, the file stays as it was. Edits of a file wait for each other, up to 10 s.
func editINI(ctx context.Context, file string, change func(*ini) error) error {
	target, err := filepath.EvalSymlinks(file)
	if err != nil {
		return usagef("%s: %w", file, err)
	}
	dir, err := os.Open(filepath.Dir(target)) // to lock it: the file itself is replaced
	if err != nil {
		return err
	}
	defer dir.Close() // and so unlock it
	if err := flockWithin(ctx, dir, editTime); err != nil {
		return fmt.Errorf("lock %s: %w", dir.Name(), err)
	}
	os.Remove(nextFile(target)) // left by a power cut, or planted; where it stays, replaceFile fails
	c, err := readINI(target)
	if err != nil {
		return err
	}
	before := c.text
	c.name = file
	if err := change(c); err != nil || c.text == before {
		return err
	}
	if err := replaceFile(target, []byte(c.text)); err != nil {
		return fmt.Errorf("write %s: %w", target, err)
	}
	return nil
}

// recoverINI removes what editINI left at a power cut. It does not wait: if another
// process holds the lock, its error wraps context.DeadlineExceeded.
func recoverINI(file string) error {
	if target, err := filepath.EvalSymlinks(file); err != nil || !exists(nextFile(target)) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 0)
	defer cancel()
	return editINI(ctx, file, func(*ini) error { return nil })
}

// flockWithin locks an open file or directory until it is closed. It waits for other
// processes until ctx ends or the time is over. A file system without locks is no error.
func flockWithin(ctx context.Context, f *os.File, wait time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch err {
		case nil, syscall.ENOLCK, syscall.ENOTSUP, syscall.ENOSYS:
			return nil
		case syscall.EWOULDBLOCK, syscall.EINTR:
		default:
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("another process holds it: %w", ctx.Err())
		}
	}
}

// replaceFile replaces the content of a file that is no symbolic link, and
// keeps its mode and owner. At every moment, and after a power cut, the file has
// either the old content or the new one, whole. After an error it has the old one,
// else the new one. That its name may not be on the disk yet is logged, and no
// error, as all can see the new content. At a power cut, nextFile may be left.
func replaceFile(file string, data []byte) error {
	old, err := os.Stat(file)
	if err != nil {
		return err
	}
	owner, next := old.Sys().(*syscall.Stat_t), nextFile(file)
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err == nil {
		_, err = f.Write(data)
		err = errors.Join(err, f.Chown(int(owner.Uid), int(owner.Gid)), f.Chmod(old.Mode()), f.Sync(), f.Close())
		if err == nil {
			err = os.Rename(next, file)
		}
		if err != nil {
			os.Remove(next)
		}
	}
	const writable = 2 // W_OK: the directory is read-only, the file is not
	if errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.EROFS) && syscall.Access(file, writable) == nil {
		return errors.New("it is a mount point: mount its directory instead")
	}
	if err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(file)); err != nil { // the new content is in its place, as all can see
		log.Printf(warning+"%s is changed, but a power cut may undo that: %v", file, err)
	}
	return nil
}

// nextFile is where the new content of a file is written first. The name is
// always the same, so that the next start finds what a power cut left.
func nextFile(file string) string {
	return filepath.Join(filepath.Dir(file), "."+filepath.Base(file)+".picket")
}

// syncDir writes the entries of a directory to the disk, so that a rename lasts.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return syncFile(d)
}

// syncFile writes an open file, or the names in a directory, to the disk. Some file
// systems cannot sync a directory; that is no error.
func syncFile(f *os.File) error {
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return err
	}
	return nil
}
