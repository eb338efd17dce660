package main

// The settings and the file they come from: client.cfg, an INI text in the
// dialect of Python 2.7's SafeConfigParser, because that is what the files
// on the boxes were written for:
//
//	[DEFAULT]
//	root: /opt/picket
//	[sensor]
//	path = %(root)s/sensors   ; the value ends before the semicolon
//	# the next line goes on from the one above it:
//	  ...
//
// A key and its value are split at the first ':' or '='; keys are
// lower-cased, sections are not. A ';' or '#' at the start of a line or after
// white space begins a comment, and a line whose first word is rem is one.
// Sections of the same name merge and the last of duplicate keys wins.
// %(name)s stands for another value of the section or of [DEFAULT], %% for a
// percent sign. Kinder than Python: an indented comment is a comment, a
// byte-order mark is skipped, and order and comments survive writing.
//
// This file reads, changes and saves that text and makes typed settings of
// it. It knows nothing of sensors or of the wire.

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
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
	maxConfig    = 1 << 20  // bytes of client.cfg: a thousand times what one needs, yet safe to hold in memory
	maxExpanded  = 64 << 10 // bytes and references of one value once it is filled in: ten levels could make it 10^10
	maxReference = 10       // levels of %(name)s, as Python has it
	maxBadLines  = 20       // reported one by one; a file that is no INI at all has thousands
	iniSpace     = " \t\n\r\v\f"
	byteMark     = "\xef\xbb\xbf"
	defaults     = "DEFAULT" // the section that every other one falls back to
)

// An iniKey names one option.
type iniKey struct{ section, option string }

// An iniValue is a value as it stands in the file, before interpolation.
type iniValue struct {
	raw  string
	line int // 1 is the first
}

// An iniLine is one line of the text and what it means.
type iniLine struct {
	text     string // with its line end
	kind     lineKind
	key      iniKey // the section it stands in; the option that it begins or continues
	from, to int    // where in text its part of the value stands
}

type lineKind int

const (
	otherLine lineKind = iota // blank, a comment
	headerLine
	optionLine
	continuationLine
)

// An ini is an INI text. Changing it changes the lines concerned and no
// other byte.
type ini struct {
	name     string // of the file, for errors
	lines    []iniLine
	sections []string // in the order of the file, without DEFAULT
	values   map[iniKey]iniValue
}

// parseINI reads an INI text. Its error tells of every bad line (the first
// twenty), each as "name:line: what is wrong".
func parseINI(name, text string) (*ini, error) {
	c := &ini{name: name, values: make(map[iniKey]iniValue)}
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s:%d: %s", name, len(c.lines)+1, fmt.Sprintf(format, args...)))
	}
	inSection := false
	var at iniKey // the section and option that the next line belongs to
	for _, text := range strings.SplitAfter(text, "\n") {
		if text == "" {
			break // after the last line end
		}
		line := iniLine{text: text, key: at}
		body, start := text, 0
		if len(c.lines) == 0 {
			body = strings.TrimPrefix(text, byteMark)
			start = len(text) - len(body)
		}
		trimmed := strings.Trim(body, iniSpace)
		indented := trimmed != "" && body[0] != trimmed[0]
		switch {
		case isComment(trimmed, indented):
		case indented && at.option != "":
			line.kind = continuationLine
			line.from = strings.Index(text, trimmed)
			line.to = valueEnd(text, line.from)
			v := c.values[at]
			v.raw += "\n" + text[line.from:line.to]
			c.values[at] = v
		case !indented && strings.Index(body, "]") > 1 && body[0] == '[':
			line.kind = headerLine
			inSection = true
			at = iniKey{section: body[1:strings.Index(body, "]")]}
			line.key = at
			if at.section != defaults && !c.hasSection(at.section) {
				c.sections = append(c.sections, at.section)
			}
		case !inSection:
			bad("no section header yet: %.80q", masked(trimmed, ""))
		case indented:
			bad("an indented line with no option to continue: %.80q", masked(trimmed, ""))
		case strings.IndexAny(body, ":=") < 1:
			bad("neither a section, an option nor a comment: %.80q", masked(trimmed, ""))
		default:
			sep := strings.IndexAny(body, ":=")
			at.option = strings.ToLower(strings.TrimRight(body[:sep], iniSpace))
			line.kind, line.key = optionLine, at
			line.from = start + sep + 1
			for line.from < len(text) && strings.IndexByte(" \t\v\f", text[line.from]) >= 0 {
				line.from++
			}
			line.to = valueEnd(text, line.from)
			raw := text[line.from:line.to]
			if raw == `""` {
				raw = "" // how the old files write an empty value
			}
			c.values[at] = iniValue{raw, len(c.lines) + 1}
		}
		c.lines = append(c.lines, line)
	}
	if n := len(errs); n > maxBadLines {
		errs = append(errs[:maxBadLines], fmt.Errorf("%s: %d more bad lines", name, n-maxBadLines))
	}
	return c, errors.Join(errs...)
}

// wordEnds are what stands between words of a message.
const wordEnds = " \t\n\""

// masked is a text with what may be user and password replaced: in each word of
// it that has a colon before an @, all before that but for the scheme of a URL.
// Words end with one of ends; "" takes the text for one word.
func masked(text, ends string) string {
	var b strings.Builder
	for {
		end := len(text)
		if i := strings.IndexAny(text, ends); i >= 0 {
			end = i
		}
		word := text[:end]
		if at := strings.LastIndex(word, "@"); at >= 0 && strings.Contains(word[:at], ":") {
			scheme, _, ok := strings.Cut(word[:at], "://")
			if ok {
				b.WriteString(scheme + "://")
			}
			word = "xxxxx" + word[at:]
		}
		b.WriteString(word)
		if end == len(text) {
			return b.String()
		}
		b.WriteByte(text[end])
		text = text[end+1:]
	}
}

// A maskedError is an error whose text shows no password.
type maskedError struct{ error }

func (e maskedError) Error() string { return masked(e.error.Error(), wordEnds) }
func (e maskedError) Unwrap() error { return e.error }

// isComment reports whether a line is blank or a comment, given its text
// without the white space around it.
func isComment(trimmed string, indented bool) bool {
	if trimmed == "" || trimmed[0] == '#' || trimmed[0] == ';' {
		return true
	}
	word := trimmed
	if i := strings.IndexAny(trimmed, iniSpace); i >= 0 {
		word = trimmed[:i]
	}
	return !indented && strings.EqualFold(word, "rem")
}

// valueEnd finds the end of the value that begins at from: a comment, or the
// end of the line, less the white space before it.
func valueEnd(text string, from int) int {
	end := len(text)
	for i := from; i < len(text); i++ {
		if (text[i] == ';' || text[i] == '#') && strings.IndexByte(iniSpace, text[i-1]) >= 0 {
			end = i
			break
		}
	}
	return from + len(strings.TrimRight(text[from:end], iniSpace))
}

// text returns the INI text, to the byte what was read, less what was changed.
func (c *ini) text() string {
	var b strings.Builder
	for _, line := range c.lines {
		b.WriteString(line.text)
	}
	return b.String()
}

// hasSection reports whether there is such a section. As in Python, DEFAULT
// is none.
func (c *ini) hasSection(section string) bool {
	return slices.Contains(c.sections, section)
}

// hasOption reports whether get finds such an option.
func (c *ini) hasOption(section, option string) bool {
	_, ok := c.raw(section, option)
	return ok
}

// options lists a section's options, those it has from DEFAULT last, each
// group in the order of the file.
func (c *ini) options(section string) []string {
	var names []string
	seen := make(map[string]bool)
	for _, from := range []string{section, defaults} {
		for _, line := range c.lines {
			if name := line.key.option; line.kind == optionLine && line.key.section == from && !seen[name] {
				seen[name] = true
				names = append(names, name)
			}
		}
	}
	return names
}

// raw looks an option up in its section, then in DEFAULT.
func (c *ini) raw(section, option string) (iniValue, bool) {
	option = strings.ToLower(option)
	if v, ok := c.values[iniKey{section, option}]; ok {
		return v, true
	}
	if section != defaults && !c.hasSection(section) {
		return iniValue{}, false
	}
	v, ok := c.values[iniKey{defaults, option}]
	return v, ok
}

// get returns an option's value with every %(name)s filled in.
func (c *ini) get(section, option string) (string, error) {
	v, ok := c.raw(section, option)
	switch {
	case !ok && section != defaults && !c.hasSection(section):
		return "", fmt.Errorf("%s: no section [%s]", c.name, section)
	case !ok:
		return "", fmt.Errorf("%s: no option %q in [%s]", c.name, option, section)
	}
	var b strings.Builder
	budget := maxExpanded
	if err := c.expand(&b, &budget, section, v.raw, []string{strings.ToLower(option)}); err != nil {
		return "", c.errorAt(section, option, err)
	}
	return b.String(), nil
}

// errorAt says in front of err which option it is about, and where that stands.
func (c *ini) errorAt(section, option string, err error) error {
	err = maskedError{err} // a URL may have come to the wrong place
	if v, ok := c.raw(section, option); ok {
		return fmt.Errorf("%s:%d: [%s] %s: %w", c.name, v.line, section, option, err)
	}
	return fmt.Errorf("%s: [%s] %s: %w", c.name, section, option, err)
}

// expand appends raw to b, its references replaced, while the budget lasts.
// The path holds the options that are being expanded, outermost first.
func (c *ini) expand(b *strings.Builder, budget *int, section, raw string, path []string) error {
	if len(path) > maxReference && strings.Contains(raw, "%") {
		return fmt.Errorf("references nested deeper than %d levels", maxReference)
	}
	for {
		before, rest, found := strings.Cut(raw, "%")
		b.WriteString(before)
		if *budget -= 1 + len(before); *budget < 0 {
			return fmt.Errorf("longer than %d bytes when filled in", maxExpanded)
		}
		if !found {
			return nil
		}
		if strings.HasPrefix(rest, "%") {
			b.WriteByte('%')
			raw = rest[1:]
			continue
		}
		end := strings.Index(rest, ")")
		if !strings.HasPrefix(rest, "(") || end < 2 || !strings.HasPrefix(rest[end:], ")s") {
			shown := "%" + rest
			if !strings.HasPrefix(rest, "(") && len(rest) > 2 {
				shown = shown[:3] // the rest may be a password
			}
			if strings.Contains(rest, "@") {
				shown = "%"
			}
			return fmt.Errorf("bad interpolation at %.80q: %%(name)s is a reference, %%%% a percent sign", shown)
		}
		name := strings.ToLower(rest[1:end])
		for i, p := range path {
			if p == name {
				return fmt.Errorf("cycle: %s -> %s", strings.Join(path[i:], " -> "), name)
			}
		}
		v, ok := c.raw(section, name)
		if name == "__name__" && !ok { // as in Python 2
			v, ok = iniValue{raw: strings.ReplaceAll(section, "%", "%%")}, true
		}
		if !ok {
			return fmt.Errorf("no option %q in [%s] or [%s] for %%(%s)s", name, section, defaults, rest[1:end])
		}
		if err := c.expand(b, budget, section, v.raw, append(path[:len(path):len(path)], name)); err != nil {
			return err
		}
		raw = rest[end+2:]
	}
}

// The typed get: what a program expects of a ConfigParser, as set and remove
// are, whether or not the settings below use it.

// getBool returns 1, yes, true and on as true and 0, no, false and off as
// false, in any case of letters.
func (c *ini) getBool(section, option string) (bool, error) {
	s, err := c.get(section, option)
	if err != nil {
		return false, err
	}
	v, err := boolean(s)
	if err != nil {
		return false, c.errorAt(section, option, err)
	}
	return v, nil
}

// getInt returns a decimal whole number.
func (c *ini) getInt(section, option string) (int, error) {
	s, err := c.get(section, option)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		return 0, c.errorAt(section, option, fmt.Errorf("%q is not a whole number", s))
	}
	return n, nil
}

// getFloat returns a decimal number.
func (c *ini) getFloat(section, option string) (float64, error) {
	s, err := c.get(section, option)
	if err != nil {
		return 0, err
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || strings.ContainsAny(s, "xX_") {
		return 0, c.errorAt(section, option, fmt.Errorf("%q is not a number", s))
	}
	return f, nil
}

// set gives an option a value, which get returns as it is given here: a
// percent sign is written %%, a newline as a continuation line. The value is
// replaced where it stands, its comment stays; a missing option is added
// behind the last one of its section, a missing section at the end. A value
// or name that would not read back the same is refused and changes nothing.
func (c *ini) set(section, option, value string) error {
	key := iniKey{section, strings.ToLower(option)}
	raw := strings.ReplaceAll(value, "%", "%%")
	parts := strings.Split(raw, "\n")
	at, after := -1, -1 // the line that defines the option; the last line of the section with a meaning
	for i, line := range c.lines {
		if line.key.section != section || line.kind == otherLine {
			continue
		}
		after = i
		if line.kind == optionLine && line.key == key {
			at = i
		}
	}
	var lines []string
	for _, line := range c.lines {
		lines = append(lines, line.text)
	}
	eol := "\n"
	if len(lines) > 0 && strings.HasSuffix(lines[0], "\r\n") {
		eol = "\r\n"
	}
	var more strings.Builder // the continuation lines
	for _, part := range parts[1:] {
		more.WriteString("\t" + part + eol)
	}
	insert := func(i int, text string) { // behind line i
		if i >= 0 && !strings.HasSuffix(lines[i], "\n") {
			lines[i] += eol
		}
		lines = append(lines[:i+1], append([]string{text}, lines[i+1:]...)...)
	}
	switch {
	case at >= 0:
		lines[at] = c.lines[at].withValue(parts[0])
		for i := at + 1; i < len(c.lines) && c.lines[i].kind != optionLine && c.lines[i].kind != headerLine; i++ {
			if c.lines[i].kind == continuationLine {
				lines[i] = ""
			}
		}
		if more.Len() > 0 {
			insert(at, more.String())
		}
	case after >= 0:
		insert(after, key.option+" = "+parts[0]+eol+more.String())
	default:
		head := "[" + section + "]" + eol
		if n := len(c.lines); n > 0 && strings.Trim(lines[n-1], iniSpace) != "" {
			head = eol + head
		}
		insert(len(lines)-1, head+key.option+" = "+parts[0]+eol+more.String())
	}
	want := maps.Clone(c.values)
	want[key] = iniValue{raw: raw}
	if err := c.become(lines, want); err != nil {
		return fmt.Errorf("set %.80q of [%.80s]: %w", option, section, err)
	}
	return nil
}

// withValue returns the text of an option's line with another value in it.
func (l iniLine) withValue(value string) string {
	before, behind := l.text[:l.from], l.text[l.to:]
	if l.from == l.to && (strings.HasSuffix(before, "=") || strings.HasSuffix(before, ":")) {
		before += " " // "key =" becomes "key = value"
	}
	if behind != "" && strings.IndexByte(iniSpace, behind[0]) < 0 {
		behind = " " + behind // a comment that followed an empty value
	}
	return before + value + behind
}

// become replaces the text, if the new one reads as exactly the values that
// are wanted.
func (c *ini) become(lines []string, want map[iniKey]iniValue) error {
	next, err := parseINI(c.name, strings.Join(lines, ""))
	if err != nil {
		return fmt.Errorf("it cannot be written so that it can be read: %w", err)
	}
	same := func(a, b iniValue) bool { return a.raw == b.raw }
	if !maps.EqualFunc(next.values, want, same) {
		return errors.New("it cannot be written so that it reads back the same")
	}
	*c = *next
	return nil
}

// removeOption removes every definition of the option in its section, and
// reports whether there was one. Its comments stay; a value in DEFAULT shows
// through again.
func (c *ini) removeOption(section, option string) (bool, error) {
	key := iniKey{section, strings.ToLower(option)}
	return c.remove(func(l iniLine) bool { return l.key == key && l.kind != headerLine })
}

// removeSection removes a section's headers and options, and reports whether
// there was one. Comments stay.
func (c *ini) removeSection(section string) (bool, error) {
	return c.remove(func(l iniLine) bool { return l.key.section == section })
}

func (c *ini) remove(doomed func(iniLine) bool) (bool, error) {
	want := maps.Clone(c.values)
	var lines []string
	removed := false
	for _, line := range c.lines {
		if line.kind == otherLine || !doomed(line) {
			lines = append(lines, line.text)
			continue
		}
		removed = true
		delete(want, line.key)
	}
	if !removed {
		return false, nil
	}
	return true, c.become(lines, want)
}

// Settings are what client.cfg says, checked and typed. Paths are absolute.
type settings struct {
	file                           string // client.cfg itself; "" where there is none
	executable, help, path, backup string
	timeout                        time.Duration
	concurrency                    int
	user                           *account // nil: whoever runs the agent
	update                         bool
	maxPackage, maxUnpacked        int64 // bytes
	publicKey                      string
	keep                           int

	monitor        *url.URL
	monitorTimeout time.Duration
	utc            bool
	noValue        string
	spool          string // a directory; "" where readings are in memory alone
	spoolSize      int64  // bytes
	monitorTLS     tlsFiles

	listen   string
	allow    []netip.Prefix // who may call; empty: everybody
	agentTLS tlsFiles
	queue    int
	syslog   bool
}

// TLSFiles is what a section says of TLS, and what is in the files.
type tlsFiles struct {
	certificate, key, ca string // "" where there is none
	name                 string // that the peer's certificate must bear; "": any
	pair                 *tls.Certificate
	pool                 *x509.CertPool
}

// equal reports whether the files hold the same, and the same is asked of a peer.
func (t *tlsFiles) equal(other tlsFiles) bool {
	if (t.pair == nil) != (other.pair == nil) || (t.pool == nil) != (other.pool == nil) || t.name != other.name {
		return false
	}
	return (t.pair == nil || slices.EqualFunc(t.pair.Certificate, other.pair.Certificate, bytes.Equal)) && (t.pool == nil || t.pool.Equal(other.pool))
}

// load reads the files. Its error begins with the option that is to blame.
func (t *tlsFiles) load() (option string, err error) {
	switch {
	case t.certificate != "" && t.key == "":
		return "certificate", errors.New("needs a key")
	case t.key != "" && t.certificate == "":
		return "key", errors.New("needs a certificate")
	case t.certificate != "":
		pair, err := tls.LoadX509KeyPair(t.certificate, t.key)
		if err != nil {
			return "certificate", err
		}
		t.pair = &pair
	}
	if t.ca != "" {
		text, err := readSmall(t.ca, maxConfig)
		if err != nil {
			return "ca", err
		}
		t.pool = x509.NewCertPool()
		if !t.pool.AppendCertsFromPEM(text) {
			return "ca", fmt.Errorf("no certificate in %s", t.ca)
		}
	}
	return "", nil
}

// options lists every option of client.cfg. The function checks a value and
// puts it into the settings; dir is the directory that relative paths start from.
var options = []struct {
	section, name, value string
	set                  func(s *settings, value, dir string) error
}{
	{"sensor", "executable", "check", func(s *settings, v, _ string) (err error) { s.executable, err = plainElement(v); return }},
	{"sensor", "help", "options", func(s *settings, v, _ string) (err error) { s.help, err = notEmpty(v); return }},
	{"sensor", "path", "sensors/", func(s *settings, v, dir string) (err error) { s.path, err = absolute(v, dir); return }},
	{"sensor", "backup", "sensors_backup/", func(s *settings, v, dir string) (err error) { s.backup, err = absolute(v, dir); return }},
	{"sensor", "timeout", "30s", func(s *settings, v, _ string) (err error) { s.timeout, err = duration(v); return }},
	{"sensor", "concurrency", "2", func(s *settings, v, _ string) (err error) { s.concurrency, err = between(v, 1, 64); return }},
	{"sensor", "user", "", func(s *settings, v, _ string) (err error) { s.user, err = credential(v); return }},
	{"sensor", "update", "yes", func(s *settings, v, _ string) (err error) { s.update, err = boolean(v); return }},
	{"sensor", "keep", "3", func(s *settings, v, _ string) (err error) { s.keep, err = between(v, 0, 1000); return }},
	{"sensor", "public_key", "", func(s *settings, v, dir string) (err error) { s.publicKey, err = keyFile(v, dir); return }},
	{"sensor", "max_package", "4M", func(s *settings, v, _ string) (err error) { s.maxPackage, err = size(v); return }},
	{"sensor", "max_unpacked", "16M", func(s *settings, v, _ string) (err error) { s.maxUnpacked, err = size(v); return }},
	{"monitor", "url", "http://localhost:8081/xmlrpc/", func(s *settings, v, _ string) (err error) { s.monitor, err = httpURL(v); return }},
	{"monitor", "timeout", "15s", func(s *settings, v, _ string) (err error) { s.monitorTimeout, err = duration(v); return }},
	{"monitor", "time", "local", func(s *settings, v, _ string) (err error) { s.utc, err = oneOf(v, "local", "utc"); return }},
	{"monitor", "no_value", "nan", func(s *settings, v, _ string) (err error) { s.noValue, err = floatText(v); return }},
	{"monitor", "spool", "", func(s *settings, v, dir string) (err error) { s.spool, err = optionalPath(v, dir); return }},
	{"monitor", "spool_size", "1M", func(s *settings, v, _ string) (err error) { s.spoolSize, err = sizeBetween(v, 64<<10, 4<<20); return }},
	{"monitor", "ca", "", func(s *settings, v, dir string) (err error) { s.monitorTLS.ca, err = keyFile(v, dir); return }},
	{"monitor", "certificate", "", func(s *settings, v, dir string) (err error) { s.monitorTLS.certificate, err = keyFile(v, dir); return }},
	{"monitor", "key", "", func(s *settings, v, dir string) (err error) { s.monitorTLS.key, err = keyFile(v, dir); return }},
	{"agent", "listen", ":8080", func(s *settings, v, _ string) (err error) { s.listen, err = address(v); return }},
	{"agent", "allow", "", func(s *settings, v, _ string) (err error) { s.allow, err = networks(v); return }},
	{"agent", "certificate", "", func(s *settings, v, dir string) (err error) { s.agentTLS.certificate, err = keyFile(v, dir); return }},
	{"agent", "key", "", func(s *settings, v, dir string) (err error) { s.agentTLS.key, err = keyFile(v, dir); return }},
	{"agent", "client_ca", "", func(s *settings, v, dir string) (err error) { s.agentTLS.ca, err = keyFile(v, dir); return }},
	{"agent", "client_name", "", func(s *settings, v, _ string) (err error) { s.agentTLS.name = v; return }},
	{"agent", "queue", "256", func(s *settings, v, _ string) (err error) { s.queue, err = between(v, 1, 65536); return }},
	{"agent", "log", "stderr", func(s *settings, v, _ string) (err error) { s.syslog, err = oneOf(v, "stderr", "syslog"); return }},
}

// settings checks the whole text. The error tells of everything that is
// wrong, each with file and line; the warnings of what nobody will read.
func (c *ini) settings(dir string) (s settings, warnings []string, err error) {
	var errs []error
	reported := make(map[int]bool) // lines: a DEFAULT is seen once through each section
	bad := func(section, name string, err error) {
		if v, _ := c.raw(section, name); v.line == 0 || !reported[v.line] {
			reported[v.line] = true
			errs = append(errs, err)
		}
	}
	for _, o := range options {
		value, err := c.value(o.section, o.name)
		if err != nil {
			bad(o.section, o.name, err)
			continue
		}
		if err := o.set(&s, value, dir); err != nil {
			bad(o.section, o.name, c.errorAt(o.section, o.name, err))
		}
	}
	if s.path == s.backup && len(errs) == 0 {
		errs = append(errs, c.errorAt("sensor", "backup", errors.New("the same directory as path")))
	}
	if len(errs) == 0 {
		errs = append(errs, c.loadTLS(&s)...)
	}
	for _, section := range c.sections {
		known := namesIn(section)
		if len(known) == 0 {
			warnings = append(warnings, fmt.Sprintf("%s:%d: unknown section [%s]%s", c.name, c.headerLine(section), section, nearest(section, namesIn(""))))
		}
		for _, name := range c.options(section) {
			if _, err := c.get(section, name); err != nil {
				bad(section, name, err)
			}
			v, own := c.values[iniKey{section, name}]
			if len(known) > 0 && own && !slices.Contains(known, name) && !c.refersTo(section, name) {
				warnings = append(warnings, fmt.Sprintf("%s:%d: unknown option %q in [%s]%s", c.name, v.line, name, section, nearest(name, known)))
			}
		}
	}
	return s, warnings, errors.Join(errs...)
}

// loadTLS reads the certificates and keys that the settings name, and refuses
// what would protect less than it looks.
func (c *ini) loadTLS(s *settings) (errs []error) {
	if option, err := s.monitorTLS.load(); err != nil {
		errs = append(errs, c.errorAt("monitor", option, err))
	}
	if option, err := s.agentTLS.load(); err != nil {
		if option == "ca" {
			option = "client_ca"
		}
		errs = append(errs, c.errorAt("agent", option, err))
	}
	switch t := s.agentTLS; {
	case t.ca != "" && t.certificate == "":
		errs = append(errs, c.errorAt("agent", "client_ca", errors.New("needs certificate and key")))
	case t.name != "" && t.ca == "":
		errs = append(errs, c.errorAt("agent", "client_name", errors.New("needs client_ca")))
	}
	return errs
}

// value returns what is in force for an option: its value in the file, with
// interpolation, or its default.
func (c *ini) value(section, option string) (string, error) {
	if !c.hasOption(section, option) {
		for _, o := range options {
			if o.section == section && o.name == strings.ToLower(option) {
				return o.value, nil
			}
		}
	}
	return c.get(section, option)
}

func (c *ini) headerLine(section string) int {
	for i, line := range c.lines {
		if line.kind == headerLine && line.key.section == section {
			return i + 1
		}
	}
	return 0
}

// refersTo reports whether another value of the section uses the option: it
// is a variable of the file's author then, not a mistake.
func (c *ini) refersTo(section, option string) bool {
	for k, v := range c.values {
		if (k.section == section || k.section == defaults) && strings.Contains(strings.ToLower(v.raw), "%("+option+")s") {
			return true
		}
	}
	return false
}

// namesIn lists the options of a section, or for "" the sections.
func namesIn(section string) []string {
	var names []string
	for _, o := range options {
		if section == "" && !slices.Contains(names, o.section) {
			names = append(names, o.section)
		} else if section == o.section {
			names = append(names, o.name)
		}
	}
	return names
}

// nearest suggests the name that was probably meant, or nothing where none is close.
func nearest(name string, known []string) string {
	best, distance := "", 1+len(name)/2
	for _, k := range known {
		if d := editDistance(strings.ToLower(name), k); d < distance {
			best, distance = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %q?)", best)
}

// editDistance counts the letters to insert, delete or replace (Levenshtein).
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			d := diagonal
			if a[i-1] != b[j-1] {
				d = 1 + min(diagonal, row[j], row[j-1])
			}
			diagonal, row[j] = row[j], d
		}
	}
	return row[len(b)]
}

// plainElement returns v if it is one plain path element.
func plainElement(v string) (string, error) {
	if v == "" || v == "." || v == ".." || strings.ContainsAny(v, "/\x00") {
		return "", fmt.Errorf("%q is not a file name", v)
	}
	return v, nil
}

// notEmpty returns v if there is anything in it.
func notEmpty(v string) (string, error) {
	if v == "" {
		return "", errors.New("a value is needed")
	}
	return v, nil
}

// absolute returns v as an absolute path; a relative one starts in dir.
func absolute(v, dir string) (string, error) {
	if v == "" {
		return "", errors.New("a directory is needed")
	}
	if filepath.IsAbs(v) {
		return filepath.Clean(v), nil
	}
	return filepath.Join(dir, v), nil
}

// optionalPath returns v as an absolute path, or nothing for nothing.
func optionalPath(v, dir string) (string, error) {
	if v == "" {
		return "", nil
	}
	return absolute(v, dir)
}

// networks reads addresses and networks with commas between them:
// 192.168.1.0/24, 10.0.0.5, fd00::/8. IPv4 in IPv6 is IPv4.
func networks(v string) ([]netip.Prefix, error) {
	var list []netip.Prefix
	for _, part := range strings.Split(v, ",") {
		part = strings.TrimSpace(part)
		if part == "" && strings.TrimSpace(v) == "" {
			return nil, nil
		}
		prefix, err := netip.ParsePrefix(part)
		if addr, err2 := netip.ParseAddr(part); err2 == nil && addr.Zone() == "" {
			prefix, err = addr.Prefix(addr.BitLen())
		}
		if addr := prefix.Addr(); err == nil && addr.Is4In6() {
			if prefix.Bits() < 96 {
				err = errors.New("IPv4 and more")
			}
			prefix = netip.PrefixFrom(addr.Unmap(), prefix.Bits()-96)
		}
		if err != nil {
			return nil, fmt.Errorf("%q is neither an address nor a network such as 192.168.1.0/24", part)
		}
		list = append(list, prefix.Masked())
	}
	return list, nil
}

// boolean reads yes, no and what else stands for them.
func boolean(v string) (bool, error) {
	switch strings.ToLower(v) {
	case "1", "yes", "true", "on":
		return true, nil
	case "0", "no", "false", "off":
		return false, nil
	}
	return false, fmt.Errorf("%q is not a boolean (yes or no)", v)
}

// keyFile returns v as an absolute path of something that is there, or nothing
// for nothing: a key that is missing must not turn into no check.
func keyFile(v, dir string) (string, error) {
	if v == "" {
		return "", nil
	}
	file, err := absolute(v, dir)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(file); err != nil {
		return "", err
	}
	return file, nil
}

// sizeBetween reads a number of bytes from low to high.
func sizeBetween(v string, low, high int64) (int64, error) {
	n, err := size(v)
	if err == nil && (n < low || n > high) {
		err = fmt.Errorf("%q is not from %dK to %dM", v, low>>10, high>>20)
	}
	return n, err
}

// size reads a number of bytes: 65536, 64K or 4M.
func size(v string) (int64, error) {
	digits, factor := v, int64(1)
	for suffix, f := range map[string]int64{"K": 1 << 10, "M": 1 << 20, "G": 1 << 30} {
		if rest, ok := strings.CutSuffix(strings.ToUpper(v), suffix); ok {
			digits, factor = rest, f
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n <= 0 || n > 1<<40/factor {
		return 0, fmt.Errorf("%q is not a size such as 65536, 64K or 4M", v)
	}
	return n * factor, nil
}

// duration reads 30 (seconds), 30s, 5m or 1h30m; it is more than zero.
func duration(v string) (time.Duration, error) {
	text := v
	if _, err := strconv.ParseFloat(v, 64); err == nil {
		text += "s"
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("%q is not a time such as 30, 30s or 5m", v)
	}
	return d, nil
}

// between reads a whole number from low to high.
func between(v string, low, high int) (int, error) {
	n, err := strconv.Atoi(v)
	if err != nil || n < low || n > high {
		return 0, fmt.Errorf("%q is not a whole number from %d to %d", v, low, high)
	}
	return n, nil
}

// oneOf reports whether v is the second of two words.
func oneOf(v, first, second string) (bool, error) {
	if v != first && v != second {
		return false, fmt.Errorf("%q is neither %s nor %s", v, first, second)
	}
	return v == second, nil
}

// floatText returns v if a monitor's float() takes it.
func floatText(v string) (string, error) {
	f, err := strconv.ParseFloat(v, 64)
	if err != nil || math.IsInf(f, 0) || strings.ContainsAny(v, "xX_") {
		return "", fmt.Errorf("%q is neither nan nor a number", v)
	}
	return v, nil
}

// address returns v if one can listen there: host:port, or :port for every
// address of the box.
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

// httpURL reads the URL of an XML-RPC endpoint: http or https, with a host.
// The error never shows a password.
func httpURL(v string) (*url.URL, error) {
	u, err := url.Parse(v)
	shown := masked(v, "")
	switch {
	case err != nil:
		return nil, errors.New("not a URL such as http://monitor:8081/xmlrpc/")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("%q is neither an http nor an https URL", shown)
	case u.Hostname() == "":
		return nil, fmt.Errorf("%q names no host", shown)
	case strings.ContainsFunc(u.Host, func(r rune) bool { return r >= 0x80 }):
		return nil, fmt.Errorf("%q: a host is written in ASCII, xn--... where its name is not", shown)
	}
	if port, err := strconv.ParseUint(u.Port(), 10, 16); u.Port() != "" && (err != nil || port == 0) {
		return nil, fmt.Errorf("%q: there is no such port", shown)
	}
	return u, nil
}

// An account is the user that sensors run as.
type account struct {
	credential *syscall.Credential // nil: the agent runs as that user already
	name, home string              // the number and / where /etc/passwd does not know the user
}

// credential returns the user, by name or number, that sensors run as, with
// the groups he is in; nil where none is set. Only root can have another.
func credential(v string) (*account, error) {
	if v == "" {
		return nil, nil
	}
	a, err := lookUp(v)
	euid := os.Geteuid()
	switch {
	case err != nil:
		return nil, err
	case int(a.credential.Uid) == euid && euid != 0:
		a.credential = nil
	case euid != 0:
		return nil, errors.New("only root can run sensors as another user")
	}
	return a, nil
}

// lookUp finds a user and his groups. A number that /etc/passwd does not know
// is taken as it is, with a group of the same number.
func lookUp(v string) (*account, error) {
	u, err := user.Lookup(v)
	id, notNumber := strconv.ParseUint(v, 10, 32)
	if err != nil && notNumber != nil {
		return nil, fmt.Errorf("no user %q: %w", v, err)
	}
	if err != nil {
		if u, err = user.LookupId(v); err != nil {
			return &account{&syscall.Credential{Uid: uint32(id), Gid: uint32(id)}, v, "/"}, nil
		}
	}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("groups of user %q: %w", v, err)
	}
	var ids []uint32
	for _, text := range append([]string{u.Uid, u.Gid}, groups...) {
		n, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("user %q: %w", v, err)
		}
		ids = append(ids, uint32(n))
	}
	return &account{&syscall.Credential{Uid: ids[0], Gid: ids[1], Groups: ids[2:]}, u.Username, u.HomeDir}, nil
}

// readINI reads and parses a file of at most 1 MiB; /dev/null is one, too.
func readINI(file string) (*ini, error) {
	text, err := readSmall(file, maxConfig)
	if err != nil {
		return nil, err
	}
	return parseINI(file, string(text))
}

// readSmall reads a file of at most limit bytes. It waits for no pipe.
func readSmall(file string, limit int64) ([]byte, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() && info.Mode()&os.ModeCharDevice == 0 {
		return nil, fmt.Errorf("%s: not a file", file)
	}
	f, err := os.Open(file)
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

// editINI reads a file, lets change alter it and, where it did, saves it. Two
// that edit the same file at once wait for each other. If anything fails, the
// file is what it was. Where step is not nil, it is asked before each change of
// the file system.
func editINI(file string, step func(what string) error, change func(*ini) error) error {
	target, err := filepath.EvalSymlinks(file)
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(target))
	if err != nil {
		return err
	}
	defer dir.Close() // which also unlocks it
	// The file itself is no good to lock: it is replaced. A file system
	// without locks is no reason to refuse.
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX); err != nil && !errors.Is(err, syscall.ENOLCK) && !errors.Is(err, syscall.ENOTSUP) && !errors.Is(err, syscall.ENOSYS) {
		return &os.PathError{Op: "lock", Path: dir.Name(), Err: err}
	}
	os.Remove(nextFile(target)) // of a power cut; replaceFile reports what is wrong with it
	c, err := readINI(target)
	if err != nil {
		return err
	}
	before := c.text()
	c.name = file
	if err := change(c); err != nil {
		return err
	}
	if c.text() == before {
		return nil
	}
	if err := replaceFile(target, []byte(c.text()), step); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}

// replaceFile replaces the content of a file that is no symbolic link,
// keeping its mode and owner. At every moment, and after a power cut, the
// file has either the old content or the new one, whole: the new one, and on the
// disk, when replaceFile returns nil; the old one when it returns an error, but
// for one of the last step, the sync of the directory. What a power cut leaves behind is at
// most nextFile.
func replaceFile(file string, data []byte, step func(what string) error) (err error) {
	old, err := os.Stat(file)
	if err != nil {
		return err
	}
	if step == nil {
		step = func(string) error { return nil }
	}
	next := nextFile(file)
	if err := step("create " + next); err != nil {
		return err
	}
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(next)
		}
	}()
	if err := keepOwner(f, old); err != nil {
		return err
	}
	if err := f.Chmod(old.Mode()); err != nil {
		return err
	}
	if err := step("write " + next); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := step("sync " + next); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := step("rename " + next); err != nil {
		return err
	}
	if err := os.Rename(next, file); err != nil {
		return err
	}
	return syncDir(filepath.Dir(file))
}

// nextFile is where the new content of a file is written first.
func nextFile(file string) string {
	return filepath.Join(filepath.Dir(file), "."+filepath.Base(file)+".picket")
}

// keepOwner gives f the owner and group of old, where it has others.
func keepOwner(f *os.File, old os.FileInfo) error {
	now, err := f.Stat()
	if err != nil {
		return err
	}
	was, is := old.Sys().(*syscall.Stat_t), now.Sys().(*syscall.Stat_t)
	if was.Uid == is.Uid && was.Gid == is.Gid {
		return nil
	}
	return f.Chown(int(was.Uid), int(was.Gid))
}

// syncDir writes a directory's entries to the disk: what makes a rename last.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) { // a file system that cannot
		return err
	}
	return nil
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
