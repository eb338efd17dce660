package main

// XML-RPC over net/http: the codec, the handler that answers commands, and the
// client that calls the monitor. None of them knows a sensor, a reading or a ticket.
//
// A command and its acknowledgement, as the XML-RPC specification has them:
//
//	<?xml version="1.0"?><methodCall><methodName>cmd_submit_reading</methodName><params>
//	<param><value><int>7</int></value></param>
//	<param><value><string>disk</string></value></param>
//	<param><value><string>percent /</string></value></param></params></methodCall>
//
//	<?xml version="1.0"?><methodResponse><params>
//	<param><value><string>OK</string></value></param></params></methodResponse>
//
// Fault codes are those of "Specification for Fault Code Interoperability".

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"
)

// The limits of a message. Each of 64 callers may make the agent hold one message, as it
// is read, decoded or answered, and a box may have 16 MiB.
const (
	maxMessage   = 64 << 10  // bytes of a command, and of its answer; a command has a few hundred
	smallMessage = 1 << 10   // bytes: commands are smaller, and do not wait for larger messages
	maxAnswer    = 512 << 10 // bytes of an answer that the client reads, besides a package
	maxTree      = 96 << 10  // bytes of memory for the elements of a message, by elementSizes: some 1,500 values
	maxDepth     = 101       // elements within each other: 32 levels of arrays and structs
	maxCalls     = 64        // calls in a system.multicall
	maxHeader    = 8 << 10   // bytes of HTTP header
)

// The limits of connections.
const (
	maxConns   = 64            // open at once, or a quarter of the files that the process may have open
	fairShare  = maxConns / 16 // connections that every caller may hold while others hold more
	sendBuffer = 16 << 10      // bytes of an unread answer that the kernel holds; else it may be megabytes

	readTimeout  = 30 * time.Second // for a whole request, on a bad link
	writeTimeout = 30 * time.Second // for an answer, from its first byte
	idleTimeout  = time.Minute      // between two requests of a connection
	fetchTime    = time.Hour        // for a package, over a link of 10 kbit/s
)

// A fault is an error with its code on the wire.
type fault struct {
	code int
	text string
}

func (f *fault) Error() string { return fmt.Sprintf("fault %d: %s", f.code, f.text) }

const (
	faultSyntax   = -32700 // not well-formed XML, or an encoding that is not known
	faultRequest  = -32600 // well-formed, but not an XML-RPC methodCall; too deep; too large, or its answer is
	faultMethod   = -32601 // no such method
	faultParams   = -32602 // wrong parameters
	faultInternal = -32603 // a defect in the agent
	faultBusy     = -32500 // the command can't be taken now
)

// faultf returns a fault. Its text is one line, whatever the arguments hold.
func faultf(code int, format string, args ...any) error {
	return &fault{code, oneLine(fmt.Sprintf(format, args...))}
}

// cut quotes a text that came from outside, and shortens it to 80 bytes.
func cut(s string) string {
	const most = 80
	if len(s) > most {
		return fmt.Sprintf("%q...", s[:most])
	}
	return strconv.Quote(s)
}

// oneLine makes a text that came from outside fit for a line of a log: it cuts it
// to 300 bytes and replaces what cannot be printed by blanks.
func oneLine(s string) string {
	const most = 300
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) { // which also drops marks that change how the rest is shown
			return ' '
		}
		return r
	}, s)
}

// XML-RPC's types as Go has them: nil, bool, int (of 32 bits: int, i4, i2,
// i1), int64 (i8), float64, string, dateTime, []byte (base64), []any (array)
// and map[string]any (struct).

// typeName returns what the specification calls the type of a value.
func typeName(v any) string {
	name, _ := describe(v)
	return name
}

// describe returns the type of a value and, unless that is an array or a struct,
// the value as it stands on the wire.
func describe(v any) (name, text string) {
	switch v := v.(type) {
	case nil:
		return "nil", ""
	case bool:
		return "boolean", map[bool]string{false: "0", true: "1"}[v]
	case int:
		return "int", strconv.Itoa(v)
	case int64:
		return "i8", strconv.FormatInt(v, 10)
	case float64:
		return "double", strconv.FormatFloat(v, 'f', -1, 64)
	case string:
		return "string", v
	case dateTime:
		return "dateTime.iso8601", string(v)
	case []byte:
		return "base64", base64.StdEncoding.EncodeToString(v)
	case []any:
		return "array", ""
	case map[string]any:
		return "struct", ""
	}
	panic(fmt.Sprintf("%T has no XML-RPC type", v))
}

// A dateTime is a dateTime.iso8601 as it stands on the wire, most often
// without a zone: 20261122T20:43:21.
type dateTime string

const dateTimeLayout = "20060102T15:04:05"

// parseDateTime returns s if it is a date and a time that exist. There may be '-' in the
// date and ':' in the time, and a fraction and a zone may follow.
func parseDateTime(s string) (dateTime, error) {
	date, clock, _ := strings.Cut(s, "T")
	plain := strings.ReplaceAll(date, "-", "") + "T" + strings.ReplaceAll(clock, ":", "")
	for _, zone := range []string{"", "Z0700", "Z07"} {
		if _, err := time.Parse("20060102T150405"+zone, plain); err == nil {
			return dateTime(s), nil
		}
	}
	return "", errors.New("not a date and time")
}

// parseDecimal reads a decimal number, 12, -0.5 or 1e6, that fits a float64.
// Nothing may stand around it.
func parseDecimal(s string) (float64, error) {
	if strings.Trim(s, "+-.eE0123456789") != "" {
		return 0, strconv.ErrSyntax // ParseFloat also takes inf, nan, 0x1p-2 and 1_000
	}
	return strconv.ParseFloat(s, 64)
}

// A decoder reads one XML-RPC message. It keeps the first error, a *fault, and goes on.
// What its methods return after an error means nothing.
type decoder struct{ err error }

// An element is an element of a message, with its own text.
type element struct {
	name     string // without a prefix: Apache's types have "ex:"
	text     []byte
	elements []*element // directly in it
}

// elementSizes holds about how many bytes a decoded element takes besides its text.
// An element that is not listed takes 16.
var elementSizes = map[string]int{"value": 48, "struct": 288}

// fail notes that the message is XML, but not XML-RPC. Only the first error counts.
func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = faultf(faultRequest, format, args...)
	}
}

// parse reads a message, with or without a byte-order mark, and returns its root
// element, which must have this name. It passes over comments, processing instructions
// and a DOCTYPE, and never expands an entity.
func (d *decoder) parse(message []byte, name string) *element {
	input := xml.NewDecoder(bytes.NewReader(bytes.TrimPrefix(message, []byte("\xef\xbb\xbf"))))
	input.CharsetReader = charsetReader
	document, size := &element{}, 0
	open := []*element{document} // the elements around the next token
	for d.err == nil {
		begin := input.InputOffset()
		token, err := input.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			d.err = malformed(err)
		}
		around := open[len(open)-1]
		switch t := token.(type) {
		case xml.StartElement:
			if len(open) > maxDepth {
				d.fail("nested too deep")
			}
			e := &element{name: t.Name.Local}
			around.elements = append(around.elements, e)
			open = append(open, e)
			if size += max(16, elementSizes[e.name]); size > maxTree {
				d.fail("too many values")
			}
		case xml.EndElement:
			open = open[:len(open)-1]
		case xml.CharData:
			around.text = append(around.text, t...)
		case xml.ProcInst:
			if strings.EqualFold(t.Target, "xml") && begin > 0 {
				d.err = malformed("a declaration that is not at the start")
			}
		case xml.Directive:
			if len(document.elements) > 0 {
				d.err = malformed("a <!DOCTYPE> that is not at the start")
			}
		}
	}
	if d.err == nil && (len(document.elements) != 1 || len(bytes.TrimSpace(document.text)) > 0) {
		d.err = malformed("not one element with nothing around it")
	}
	return d.parts(document, name)[0]
}

// malformed returns the fault for a message that is not well-formed XML.
func malformed(what any) error { return faultf(faultSyntax, "not well-formed XML: %v", what) }

// charsetReader decodes the encodings, besides UTF-8, that old peers declare.
func charsetReader(label string, r io.Reader) (io.Reader, error) {
	switch strings.ToLower(label) {
	case "us-ascii", "ascii", "utf8": // a part or another name of UTF-8
		return r, nil
	case "iso-8859-1", "iso8859-1", "latin1", "latin-1":
		latin1, err := io.ReadAll(r)
		var text []byte
		for _, c := range latin1 { // each byte is the number of its character
			text = utf8.AppendRune(text, rune(c))
		}
		return bytes.NewReader(text), err
	}
	return nil, fmt.Errorf("unknown encoding %s", cut(label))
}

// parts returns the elements in e, which must have these names in this order, and
// nothing but white space between them.
func (d *decoder) parts(e *element, names ...string) []*element {
	for i, name := range names {
		if i == len(e.elements) {
			d.fail("<%s> is missing in <%s>", name, e.name)
			e.elements = append(e.elements, &element{name: name})
		}
		if got := e.elements[i].name; got != name {
			d.fail("<%s> where <%s> belongs", got, name)
		}
	}
	if n := len(names); n < len(e.elements) {
		d.fail("<%s> has no place in <%s>", e.elements[n].name, e.name)
	}
	if text := bytes.TrimSpace(e.text); len(text) > 0 {
		d.fail("text %s in <%s>", cut(string(text)), e.name)
	}
	return e.elements
}

// list returns the elements in e, any number, which must all have this name.
func (d *decoder) list(e *element, name string) []*element {
	return d.parts(e, strings.Fields(strings.Repeat(name+" ", len(e.elements)))...)
}

// text returns the text of e, in which there must be no elements.
func (d *decoder) text(e *element) string {
	if len(e.elements) > 0 {
		d.fail("<%s> has no place in <%s>", e.elements[0].name, e.name)
	}
	return string(e.text)
}

// value returns what a <value> holds.
func (d *decoder) value(e *element) any {
	if len(e.elements) == 0 {
		return string(e.text) // without a type it is a string
	}
	typed := d.parts(e, e.elements[0].name)[0]
	switch typed.name {
	case "array":
		values := []any{}
		for _, value := range d.list(d.parts(typed, "data")[0], "value") {
			values = append(values, d.value(value))
		}
		return values
	case "struct":
		members := make(map[string]any)
		for _, member := range d.list(typed, "member") {
			pair := d.parts(member, "name", "value")
			members[d.text(pair[0])] = d.value(pair[1])
		}
		return members
	}
	text := d.text(typed)
	v, err := scalar(typed.name, text)
	if err != nil {
		d.fail("<%s> cannot hold %s", typed.name, cut(text))
	}
	return v
}

// scalar reads a text as a value of the named type. An array or a struct is no scalar.
// The types that are not in the specification are Apache's.
func scalar(name, text string) (v any, err error) {
	trimmed := strings.TrimSpace(text)
	switch name {
	case "string":
		return text, nil
	case "int", "i4", "i2", "i1":
		n, err := strconv.ParseInt(trimmed, 10, 32)
		return int(n), err
	case "i8", "biginteger":
		return strconv.ParseInt(trimmed, 10, 64)
	case "boolean":
		if trimmed != "1" && trimmed != "0" {
			err = errors.New("neither 1 nor 0")
		}
		return trimmed == "1", err
	case "double", "float", "bigdecimal":
		return parseDecimal(trimmed)
	case "dateTime.iso8601", "dateTime":
		return parseDateTime(trimmed)
	case "base64":
		return base64.StdEncoding.DecodeString(strings.Join(strings.Fields(text), ""))
	case "nil":
		if trimmed != "" {
			err = errors.New("not empty")
		}
		return nil, err
	}
	return nil, errors.New("no such type")
}

// params returns the values that <params> holds.
func (d *decoder) params(e *element) []any {
	params := []any{}
	for _, param := range d.list(e, "param") {
		params = append(params, d.value(d.parts(param, "value")[0]))
	}
	return params
}

// decodeCall reads a methodCall. Its errors are faults.
func decodeCall(message []byte) (method string, params []any, err error) {
	var d decoder
	root := d.parse(message, "methodCall")
	if len(root.elements) == 1 { // without parameters <params> may be left out
		root.elements = append(root.elements, &element{name: "params"})
	}
	parts := d.parts(root, "methodName", "params")
	if method = strings.TrimSpace(d.text(parts[0])); method == "" {
		d.fail("<methodName> is empty")
	}
	params = d.params(parts[1])
	return method, params, d.err
}

// decodeResponse reads a methodResponse and returns its value, or nil if it has
// none. The error is a *fault exactly when the peer sent one; any other means that
// the message was no response.
func decodeResponse(message []byte) (v any, err error) {
	var d decoder
	root := d.parse(message, "methodResponse")
	if len(root.elements) > 0 && root.elements[0].name == "fault" {
		sent := d.parts(d.parts(root, "fault")[0], "value")[0]
		members, _ := d.value(sent).(map[string]any) // peers send any value, and codes as strings
		_, digits := describe(members["faultCode"])
		code, _ := strconv.Atoi(digits)
		_, text := describe(members["faultString"])
		err = faultf(code, "%s", text)
	} else if params := d.params(d.parts(root, "params")[0]); len(params) > 0 {
		v = params[0]
	}
	if f := (*fault)(nil); errors.As(d.err, &f) {
		return nil, errors.New(f.text)
	}
	return v, err
}

const xmlDeclaration = `<?xml version="1.0"?>`

// encodeCall returns a methodCall in UTF-8. Characters that XML 1.0 cannot
// hold become U+FFFD, here and in every other message.
func encodeCall(method string, params ...any) []byte {
	var b bytes.Buffer
	b.WriteString(xmlDeclaration + "<methodCall>")
	writeElement(&b, "methodName", method)
	b.WriteString("<params>")
	for _, p := range params {
		b.WriteString("<param>")
		writeValue(&b, p)
		b.WriteString("</param>")
	}
	b.WriteString("</params></methodCall>")
	return b.Bytes()
}

// encodeResponse returns a methodResponse with the value or, unless err is nil, a fault.
func encodeResponse(v any, err error) []byte {
	var b bytes.Buffer
	before, behind := "<params><param>", "</param></params>"
	if err != nil {
		v, before, behind = faultStruct(err), "<fault>", "</fault>"
	}
	b.WriteString(xmlDeclaration + "<methodResponse>" + before)
	writeValue(&b, v)
	b.WriteString(behind + "</methodResponse>")
	return bytes.Clone(b.Bytes()) // without spare room, as it is held until the peer has read it
}

// faultStruct returns an error as the value of a <fault>. An error that is no *fault
// is a defect of the agent, and its text stays here.
func faultStruct(err error) map[string]any {
	f := &fault{faultInternal, "internal error"}
	errors.As(err, &f)
	return map[string]any{"faultCode": f.code, "faultString": f.text}
}

// writeValue writes <value> with its type, the members of a struct by name.
func writeValue(b *bytes.Buffer, v any) {
	b.WriteString("<value>")
	switch v := v.(type) {
	case nil:
		b.WriteString("<nil/>")
	case []any:
		b.WriteString("<array><data>")
		for _, e := range v {
			writeValue(b, e)
		}
		b.WriteString("</data></array>")
	case map[string]any:
		b.WriteString("<struct>")
		for _, name := range sortedKeys(v) {
			b.WriteString("<member>")
			writeElement(b, "name", name)
			writeValue(b, v[name])
			b.WriteString("</member>")
		}
		b.WriteString("</struct>")
	default:
		name, text := describe(v)
		writeElement(b, name, text)
	}
	b.WriteString("</value>")
}

// writeElement writes an element with a text, in which it escapes what XML requires.
func writeElement(b *bytes.Buffer, name, text string) {
	b.WriteString("<" + name + ">")
	xml.EscapeText(b, []byte(text)) // writing to a Buffer cannot fail
	b.WriteString("</" + name + ">")
}

// sortedKeys returns the keys of a map, in the order of bytes.
func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// A method is one name on the wire. Its call gets as many parameters as one of the
// signatures has, of any type. It returns a value of an XML-RPC type or a *fault. Any
// other error is a defect.
type method struct {
	name       string
	signatures string // "string int string, string string string": what it returns, then what it takes
	help       string
	call       func(r request, params []any) (any, error)
}

// A request says who made a call, and when it arrived.
type request struct {
	ctx      context.Context // ends when nobody waits for the answer any more
	peer     string          // host
	received time.Time
}

// An access says who may call, and how.
type access struct {
	allow []netip.Prefix // empty: everybody
	tls   *tls.Config    // nil: without TLS
}

// allows reports whether a host may call. It treats ::ffff:1.2.3.4 as 1.2.3.4.
func (a *access) allows(host string) bool {
	addr, err := netip.ParseAddr(host)
	addr = addr.Unmap().WithZone("")
	isIn := func(p netip.Prefix) bool { return p.Contains(addr) }
	return len(a.allow) == 0 || err == nil && slices.ContainsFunc(a.allow, isIn)
}

// hostOf returns the host of a peer's address.
func hostOf(address string) string {
	host, _, _ := net.SplitHostPort(address) // which net made
	return host
}

// limitKey returns the name under which a host and its neighbours are counted as one
// caller: its IPv4 address, or the /64 network of its IPv6 address, as one caller may
// own all of that.
func limitKey(host string) string {
	addr, err := netip.ParseAddr(host)
	if addr = addr.Unmap().WithZone(""); err != nil || addr.Is4() {
		return addr.String()
	}
	prefix, _ := addr.Prefix(64) // no error: it has 128 bits
	return prefix.String()
}

// newTLS returns the rules for every connection over TLS. Certificates are checked at
// the time of the clock, but never at one before the program was built: a box may boot in
// 1970.
func newTLS(built time.Time) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, Time: func() time.Time {
		if now := time.Now(); now.After(built) {
			return now
		}
		return built
	}}
}

// bearsName reports whether a certificate was issued for a name: as its subject, as
// the subject's common name or as one of its alternative names.
func bearsName(c *x509.Certificate, name string) bool {
	names := append([]string{c.Subject.String(), c.Subject.CommonName}, c.DNSNames...)
	names = append(names, c.EmailAddresses...)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	return slices.Contains(names, name)
}

// A handler answers XML-RPC calls over HTTP: its own methods and those of
// introspection. 16 MiB of memory are enough, whatever callers send or leave unread.
type handler struct {
	net.Listener // that it accepts connections from
	methods      map[string]method
	refused      logLimit
	turn         sync.Mutex // held while a large message is decoded or a large answer encoded
	http         *http.Server
	count        atomic.Int64           // calls and connections refused
	access       atomic.Pointer[access] // the rules in force

	mu    sync.Mutex         // guards what is below
	conns map[net.Conn]*peer // the open connections, as net/http has them
	most  int                // connections at once
}

// A peer is at the other end of an open connection. handler.mu guards it.
type peer struct {
	raw     net.Conn // the connection without TLS
	host    string
	key     string      // limitKey of that
	tls     *tls.Config // the rules for TLS in force when it came
	working bool        // a call is being answered
	since   time.Time   // when it came, or its latest call began or ended
}

// newHandler returns a handler that answers everybody, without TLS.
func newHandler(methods []method) *handler {
	h := &handler{
		methods: make(map[string]method),
		conns:   make(map[net.Conn]*peer),
	}
	h.access.Store(&access{})
	files := syscall.Rlimit{Cur: 4 * maxConns} // unless the kernel says how many
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files)
	h.most = int(max(1, min(files.Cur/4, maxConns)))
	h.http = &http.Server{
		Handler:                      h,
		ReadTimeout:                  readTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeader - 4096, // net/http reads 4096 more
		DisableGeneralOptionsHandler: true,
		ErrorLog: log.New(writerFunc(func(line []byte) (int, error) { // mostly a peer did something wrong
			h.refuse("%s", oneLine(strings.TrimSpace(string(line))))
			return len(line), nil
		}), "", 0),
		ConnState: func(c net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				h.mu.Lock()
				defer h.mu.Unlock()
				delete(h.conns, c)
			}
		},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, h, c) // for setWorking
		},
	}
	for _, m := range append(methods, h.introspection()...) {
		h.methods[m.name] = m
	}
	return h
}

// refuse counts and logs a refusal.
func (h *handler) refuse(format string, args ...any) {
	h.count.Add(1)
	h.refused.printf(warning+format, args...)
}

// serve answers calls until the listener or the server is closed. It always returns
// an error, then http.ErrServerClosed or the listener's.
func (h *handler) serve(l net.Listener) error {
	h.Listener = l
	return h.http.Serve(h)
}

// Accept waits for the next connection, for net/http.
func (h *handler) Accept() (net.Conn, error) {
	c, err := h.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if t, ok := c.(*net.TCPConn); ok {
		t.SetWriteBuffer(sendBuffer)
	}
	return h.admit(c), nil
}

// admit notes a new connection and returns it, with TLS if the rules in force say so.
// If there are then too many, it closes another one.
func (h *handler) admit(raw net.Conn) (c net.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	host, rules := hostOf(raw.RemoteAddr().String()), h.access.Load().tls
	if c = raw; rules != nil {
		c = tls.Server(raw, rules)
	}
	h.conns[c] = &peer{raw: raw, host: host, key: limitKey(host), tls: rules, since: time.Now()}
	if len(h.conns) > h.most {
		closes := h.connToClose(c)
		h.refuse("%s: connection closed: more than %d", h.conns[closes].host, h.most)
		h.close(closes)
	}
	return c
}

// close closes a connection, which cancels the call on it. The caller holds h.mu.
func (h *handler) close(c net.Conn) {
	h.conns[c].raw.Close() // without TLS's farewell, which may take a while
	delete(h.conns, c)
}

// connToClose returns the connection that gives way to the newest one: one whose host
// may not call, else one of the caller that holds most, so that nobody keeps the monitor
// out by holding many. Among those it takes the one that has been idle longest or, if all
// have calls, the one with the latest call.
func (h *handler) connToClose(newest net.Conn) (first net.Conn) {
	rules, held := h.access.Load(), make(map[string]int)
	for _, p := range h.conns {
		held[p.key]++
	}
	var least []int64 // the worth of first
	for c, p := range h.conns {
		// By rank: whether it may call, how few the caller holds, whether it has a call, since when.
		worth := []int64{0, int64(-max(held[p.key], fairShare)), 0, -int64(time.Since(p.since))}
		if rules.allows(p.host) {
			worth[0] = 1
		}
		if p.working {
			worth[2], worth[3] = 1, -worth[3]
		}
		if c != newest && (first == nil || slices.Compare(worth, least) < 0) {
			first, least = c, worth
		}
	}
	return first
}

// setAccess changes who may call, and how. If the rules for TLS change, it closes
// the connections that came under the old ones. A call under way is finished, as the
// last one on its connection.
func (h *handler) setAccess(a *access) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.access.Store(a)
	for c, p := range h.conns {
		if !p.working && p.tls != a.tls {
			h.close(c)
		}
	}
}

// setWorking notes that a call begins or ends. It reports false if the connection is
// closed, or came under rules for TLS that are no longer in force.
func (h *handler) setWorking(r *http.Request, working bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.conns[r.Context().Value(h).(net.Conn)]
	if p != nil {
		p.working, p.since = working, time.Now()
	}
	return p != nil && p.tls == h.access.Load().tls
}

// ServeHTTP answers one call, or logs that it refuses it with an HTTP status.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	control.SetWriteDeadline(time.Now().Add(writeTimeout)) // for a 100 Continue, before the body
	status, answer := h.answer(w, r)
	control.SetWriteDeadline(time.Now().Add(writeTimeout))
	if status != http.StatusOK {
		h.refuse("%s: %s %s: HTTP %d", hostOf(r.RemoteAddr), cut(r.Method), cut(r.URL.Path), status)
		http.Error(w, http.StatusText(status), status)
		return
	}
	w.Header().Set("Content-Type", "text/xml")
	w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	w.Write(answer) // an error means that the peer has gone
}

// checkRequest checks the head of a request. It returns 200, or the status of a refusal.
func (h *handler) checkRequest(w http.ResponseWriter, r *http.Request) (status int) {
	switch encoding := r.Header.Get("Content-Encoding"); {
	case !h.access.Load().allows(hostOf(r.RemoteAddr)):
		w.Header().Set("Connection", "close") // so that net/http does not read the body either
		return http.StatusForbidden
	case !slices.Contains([]string{"/xmlrpc", "/xmlrpc/", "/RPC2", "/"}, r.URL.Path):
		return http.StatusNotFound
	case r.Method != http.MethodPost:
		w.Header().Set("Allow", http.MethodPost)
		return http.StatusMethodNotAllowed
	case r.Header.Get("Content-Length") == "" && len(r.TransferEncoding) == 0:
		return http.StatusLengthRequired
	case encoding != "" && !strings.EqualFold(encoding, "identity"):
		return http.StatusUnsupportedMediaType
	case r.ContentLength > maxMessage:
		return http.StatusRequestEntityTooLarge
	}
	return http.StatusOK
}

// answer reads a call and returns the HTTP status and, with 200, the methodResponse.
func (h *handler) answer(w http.ResponseWriter, r *http.Request) (status int, answer []byte) {
	if status = h.checkRequest(w, r); status != http.StatusOK {
		return status, nil
	}
	message, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxMessage))
	switch {
	case errors.As(err, new(*http.MaxBytesError)):
		return http.StatusRequestEntityTooLarge, nil
	case err != nil:
		return http.StatusBadRequest, nil // broken off, broken chunks, out of time
	}
	http.NewResponseController(w).SetReadDeadline(time.Time{}) // else it would end the call
	if !h.setWorking(r, true) {
		panic(http.ErrAbortHandler) // as if the connection had been closed a moment before
	}
	defer func() {
		if !h.setWorking(r, false) {
			w.Header().Set("Connection", "close")
		}
	}()
	peer := hostOf(r.RemoteAddr)
	var name string
	var params []any
	h.inTurn(len(message) > smallMessage, func() { name, params, err = decodeCall(message) })
	if err != nil {
		h.refuse("%s: %v", peer, err)
		return http.StatusOK, encodeResponse(nil, err)
	}
	v, err := h.call(request{r.Context(), peer, time.Now()}, name, params)
	_, isText := v.(string)    // as OK is; a list may be long
	_, isPackage := v.([]byte) // which a monitor returns
	h.inTurn(!isText, func() {
		if answer = encodeResponse(v, err); len(answer) > maxMessage && !isPackage {
			err = faultf(faultRequest, "the answer has more than %d bytes", maxMessage)
			h.refuse("%s: %s: %v", peer, cut(name), err)
			answer = encodeResponse(nil, err)
		}
	})
	return http.StatusOK, answer
}

// inTurn calls f, which decodes a message or encodes an answer. Large ones take turns,
// because one of 64 KiB may take 4 MiB for a moment. Small ones do not wait.
func (h *handler) inTurn(large bool, f func()) {
	if large {
		h.turn.Lock()
		defer h.turn.Unlock()
	}
	f()
}

// call runs one method. It logs each error: a *fault, or else a defect, as a panic is.
func (h *handler) call(r request, name string, params []any) (v any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v\n%s", p, debug.Stack())
		}
		if errors.As(err, new(*fault)) {
			h.refuse("%s: %s: %v", r.peer, cut(name), err)
		} else if err != nil {
			log.Printf(severe+"%s: %s: defect: %v", r.peer, cut(name), err)
		}
	}()
	m, ok := h.methods[name]
	if !ok {
		return nil, faultf(faultMethod, "no such method: %s", cut(name))
	}
	fits := func(signature string) bool { return strings.Count(signature, " ") == len(params) }
	if !slices.ContainsFunc(strings.Split(m.signatures, ", "), fits) {
		return nil, faultf(faultParams, "%s cannot take %s: %s", name, plural(len(params), "parameter"), m.help)
	}
	return m.call(r, params)
}

// introspection returns the methods that every XML-RPC server has under system.
func (h *handler) introspection() []method {
	return []method{
		{"system.listMethods", "array", "The names of all methods.",
			func(request, []any) (any, error) { return array(sortedKeys(h.methods)), nil }},
		{"system.methodHelp", "string string", "What a method does.", h.about(func(m method) any { return m.help })},
		{"system.methodSignature", "array string",
			"For each way to call a method: the type that it returns, then those of its parameters.",
			h.about(method.types)},
		{"system.multicall", "array array",
			"Calls several methods, each a struct of methodName and params; " +
				"for each there is an array of its one result, or the struct of a fault.", h.multicall},
		{"system.getCapabilities", "struct", "The specifications that it follows.",
			func(request, []any) (any, error) { return capabilities, nil }},
	}
}

// array returns texts as an XML-RPC array.
func array(texts []string) []any {
	values := []any{}
	for _, text := range texts {
		values = append(values, text)
	}
	return values
}

// about returns a method that says something about the method that its parameter names.
func (h *handler) about(say func(method) any) func(request, []any) (any, error) {
	return func(_ request, params []any) (any, error) {
		name, _ := params[0].(string)
		m, ok := h.methods[name]
		if !ok {
			return nil, faultf(faultParams, "no such method: %s", cut(name))
		}
		return say(m), nil
	}
}

// types returns an array of signatures, each an array of types.
func (m method) types() any {
	signatures := []any{}
	for _, signature := range strings.Split(m.signatures, ", ") {
		signatures = append(signatures, array(strings.Fields(signature)))
	}
	return signatures
}

// capabilities is the answer of system.getCapabilities. All answers share it: a
// system.multicall may ask for it 64 times.
var capabilities = map[string]any{
	"xmlrpc":           capability("http://www.xmlrpc.com/spec", 1),
	"introspection":    capability("http://xmlrpc-c.sourceforge.net/introspection.html", 1),
	"system.multicall": capability("http://www.xmlrpc.com/discuss/msgReader$1208", 1),
	"faults_interop":   capability("http://xmlrpc-epi.sourceforge.net/specs/rfc.fault_codes.php", 20010516),
	"nil":              capability("http://ontosys.com/xml-rpc/extensions.php", 20010518),
}

func capability(specification string, version int) map[string]any {
	return map[string]any{"specUrl": specification, "specVersion": version}
}

// multicall calls methods one after the other. Their results must fit in one answer.
func (h *handler) multicall(r request, params []any) (any, error) {
	calls, ok := params[0].([]any)
	if !ok || len(calls) > maxCalls {
		return nil, faultf(faultParams, "system.multicall takes an array of at most %d structs", maxCalls)
	}
	results, size := []any{}, 0
	for _, c := range calls {
		call, _ := c.(map[string]any)
		name, named := call["methodName"].(string)
		params, listed := call["params"].([]any)
		var v any
		var err error
		if !named || !listed && call["params"] != nil || name == "system.multicall" {
			err = faultf(faultParams, "a call is a struct of methodName and params, and not of system.multicall")
		} else {
			v, err = h.call(r, name, params)
		}
		result := any([]any{v})
		if err != nil {
			result = faultStruct(err)
		}
		if size += len(encodeResponse(v, err)); size > maxMessage {
			return nil, faultf(faultRequest, "results of more than %d bytes: call fewer methods at once", maxMessage)
		}
		results = append(results, result)
	}
	return results, nil
}

// A client calls the XML-RPC methods of one URL. It follows no redirect and
// uses no proxy: what it sends goes to that URL or nowhere. If the name of the host
// has several addresses, it begins with the one that it called last or, if there was
// no answer, with the next.
type client struct {
	url     *url.URL
	timeout time.Duration // of a call as a whole
	tls     *tls.Config
	http    *http.Client
	lookup  func(ctx context.Context, host string) ([]string, error)

	first atomic.Uint32 // the index of the address to begin with, modulo how many there are
}

// newClient returns a client. Each of its calls takes at most the timeout as a whole. The
// rules are for https (nil: those of crypto/tls).
func newClient(u *url.URL, timeout time.Duration, config *tls.Config) *client {
	c := &client{url: u, timeout: timeout, tls: config, lookup: net.DefaultResolver.LookupHost}
	if host, _, hasZone := strings.Cut(u.Hostname(), "%"); hasZone && config != nil && config.ServerName == "" {
		config = config.Clone()
		config.ServerName = host // a certificate is of an address without a zone
	}
	c.http = &http.Client{
		Transport: &http.Transport{
			DialContext:            c.dial,
			TLSClientConfig:        config,
			TLSHandshakeTimeout:    timeout,
			DisableCompression:     true,
			MaxResponseHeaderBytes: maxHeader,
			MaxIdleConnsPerHost:    1,
			// The readings of a burst share a connection. It is closed soon after them,
			// as a monitor that serves one at a time can serve nobody else until then.
			IdleConnTimeout: 200 * time.Millisecond,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c
}

// close closes the connection that waits for another call.
func (c *client) close() { c.http.CloseIdleConnections() }

// call calls a method and returns its result. The error is a *fault exactly
// when the peer answered with one, and wraps context.Canceled when ctx was
// cancelled; then a call that had not begun is not sent.
func (c *client) call(ctx context.Context, name string, params ...any) (v any, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, fmt.Errorf("no answer in %v", c.timeout))
	defer cancel()
	err = c.post(ctx, name, params, func(body io.Reader) error {
		v, err = readAnswer(nil, body)
		return err
	})
	return v, err
}

const tooLong = "answer longer than %d bytes"

// readAnswer reads the rest of an answer that begins with head, and returns its value. It
// refuses one with thousands of attributes, each of which takes 300 bytes of memory.
func readAnswer(head []byte, rest io.Reader) (any, error) {
	answer := bytes.NewBuffer(head)
	_, err := answer.ReadFrom(io.TeeReader(rest, atMost(maxAnswer, tooLong, io.Discard)))
	if err == nil && bytes.Count(answer.Bytes(), []byte("=")) > maxMessage/8 {
		err = errors.New("an answer with too many attributes")
	}
	if err != nil {
		return nil, err
	}
	return decodeResponse(answer.Bytes())
}

// callHeader is the header of every call. The key is not sent, but lets net/http send the
// call again when the monitor has just closed the connection that was kept.
var callHeader = http.Header{"Content-Type": {"text/xml"}, "User-Agent": {"picket"}, "Idempotency-Key": nil}

// post sends a call and calls read with the body of the answer, if its HTTP status
// is a success. It sends nothing to a URL with a fragment: a # in a password makes one,
// and a wrong host. If ctx ended before the answer came, the error is its cause.
func (c *client) post(ctx context.Context, name string, params []any, read func(io.Reader) error) error {
	if c.url.Fragment != "" {
		return errors.New("nothing is sent: its URL has a fragment: write # as %23, in client.cfg %%23")
	}
	call := bytes.NewReader(encodeCall(name, params...))
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url.String(), call)
	if err != nil {
		return err
	}
	r.Header = callHeader
	answer, err := c.http.Do(r)
	if err == nil {
		defer answer.Body.Close()
		if answer.StatusCode/100 == 2 {
			err = read(answer.Body)
		} else {
			err = fmt.Errorf("HTTP %s", cut(answer.Status))
		}
	} else if !errors.Is(context.Cause(ctx), context.Canceled) {
		c.first.Add(1)
	}
	cause, sent, wrapped := context.Cause(ctx), (*fault)(nil), (*url.Error)(nil)
	switch {
	case err != nil && cause != nil && !errors.As(err, &sent):
		return cause
	case errors.As(err, &wrapped):
		return wrapped.Err // without the URL, which the caller knows
	}
	return err
}

// dial connects to the first address of the host that it reaches, in equal shares of time.
func (c *client) dial(ctx context.Context, network, hostPort string) (conn net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout) // net/http passes on no deadline
	defer cancel()
	host, port, _ := net.SplitHostPort(hostPort) // which net/http made
	addresses, err := c.lookup(ctx, host)
	if err != nil {
		return nil, err
	}
	slices.Sort(addresses) // a name server may give them in another order each time
	n := len(addresses)
	dialer := net.Dialer{Timeout: c.timeout / time.Duration(n)}
	for range addresses {
		at := c.first.Load() % uint32(n)
		if conn, err = dialer.DialContext(ctx, network, net.JoinHostPort(addresses[at], port)); err == nil {
			break
		}
		c.first.Add(1)
	}
	return conn, err
}

// fetch calls a method whose result is base64, and writes the decoded bytes while
// they arrive, so that only a few KiB are in memory. It fails if nothing comes for the
// client's timeout, if it takes more than fetchTime, or if far more comes than a
// result of limit bytes needs.
func (c *client) fetch(ctx context.Context, to io.Writer, limit int64, name string, params ...any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, fetchTime, fmt.Errorf("not complete in %v", fetchTime))
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	idle := time.AfterFunc(c.timeout, func() { stop(fmt.Errorf("nothing has come for %v", c.timeout)) })
	defer idle.Stop()
	meter := atMost(2*limit+maxAnswer, tooLong, writerFunc(func(p []byte) (int, error) {
		idle.Reset(c.timeout)
		return len(p), nil
	}))
	return c.post(ctx, name, params, func(body io.Reader) error {
		return readPackage(io.TeeReader(body, meter), bufio.NewWriterSize(to, 32<<10))
	})
}

// readPackage reads a methodResponse whose value is base64, and writes the decoded
// bytes to a writer. It decodes the text of the first <base64> while that arrives;
// what stands before and after it is then read as a response of its own.
func readPackage(r io.Reader, to *bufio.Writer) error {
	limit := &io.LimitedReader{R: r, N: maxAnswer}
	in := bufio.NewReader(limit)
	head, err := []byte{}, error(nil)
	for piece := head; err == nil && !opensBase64(piece); head = append(head, piece...) {
		piece, err = in.ReadBytes('>')
	}
	limit.N = math.MaxInt64 // readAnswer and the caller have limits of their own
	found := err == nil
	if found {
		if _, err = io.Copy(to, base64.NewDecoder(base64.StdEncoding, textReader{in})); err != nil {
			return err
		}
	}
	v, err := readAnswer(head, in)
	if err != nil {
		return err
	}
	if rest, ok := v.([]byte); !ok || len(rest) > 0 || !found {
		return fmt.Errorf("got %s; want one piece of base64", typeName(v))
	}
	return to.Flush()
}

// opensBase64 reports whether a piece that ends at a '>' ends in a tag <base64>.
func opensBase64(piece []byte) bool {
	tag := piece[max(0, bytes.LastIndexByte(piece, '<')):]
	name := string(tag[:max(0, bytes.IndexAny(tag, "> \t\r\n"))])
	return name == "<base64" || name == "<ex:base64"
}

// A textReader reads text up to the next tag, without its white space.
type textReader struct{ *bufio.Reader }

func (t textReader) Read(p []byte) (n int, err error) {
	for n < len(p) {
		c, err := t.ReadByte()
		switch {
		case err != nil:
			return n, err
		case c == '<':
			t.UnreadByte() // no error: it was just read
			return n, io.EOF
		case strings.IndexByte(" \t\r\n", c) < 0:
			p[n] = c
			n++
		}
	}
	return n, nil
}

// A writerFunc is a writer that calls the function with what is written.
type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// atMost returns a writer to another one. It fails when more than limit bytes come.
func atMost(limit int64, excess string, to io.Writer) io.Writer {
	left := limit
	return writerFunc(func(p []byte) (int, error) {
		if left -= int64(len(p)); left < 0 {
			return 0, fmt.Errorf(excess, limit)
		}
		return to.Write(p)
	})
}

// plural returns "1 reading", "2 readings".
func plural(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprint(n, " ", noun)
}

// A line of the log may begin with its severity, as syslog counts. The writer of the log
// takes it away again. A line without it is information.
const (
	severe  = "<3>"
	warning = "<4>"
	notice  = "<5>"
)

// A logLimit logs lines that outsiders cause: at most a burst of them, then so many a
// second. Before the next line it says how many it left out.
type logLimit struct {
	burst, perSecond float64 // zero: 20, then one each 5 s

	mu    sync.Mutex // guards what is below
	spent float64
	last  time.Time
	left  int
}

func (l *logLimit) printf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.burst == 0 {
		l.burst, l.perSecond = 20, 0.2
	}
	now := time.Now()
	l.spent = max(0, l.spent-now.Sub(l.last).Seconds()*l.perSecond)
	l.last = now
	if l.spent+1 > l.burst {
		l.left++
		return
	}
	l.spent++
	if l.left > 0 {
		log.Printf(notice+"%s left out", plural(l.left, "line"))
		l.left = 0
	}
	log.Printf(format, args...)
}
