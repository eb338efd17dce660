package main

// XML-RPC over net/http: the codec, the handler that answers commands, and the
// client that calls the monitor. It knows no sensor, no reading and no ticket.
//
// A command and its acknowledgement, as the XML-RPC specification has them:
//
//	<?xml version="1.0"?><methodCall><methodName>cmd_submit_reading</methodName><params>
//	<param><value><int>7</int></value></param>
//	<param><value><string>disk</string></value></param>
//	<param><value><string>percent /</string></value></param></params></methodCall>
//
//	<?xml version="1.0"?><methodResponse><params><param><value><string>OK</string></value></param></params></methodResponse>
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
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
)

const (
	maxMessage = 512 << 10 // bytes of a command or an answer: a command has a few hundred
	maxDepth   = 32        // levels of arrays and structs
	maxValues  = 4096      // values in a message, so that 512 KiB of <value/> stay within a few 100 KiB of memory
	maxCalls   = 64        // calls in a system.multicall
	maxHeader  = 8 << 10   // bytes of HTTP header
	maxToken   = 64 << 10  // bytes of one tag or text of a command; a tag of 512 KiB could hold 130,000 attributes in 25 MiB
	maxConns   = 64        // connections open at once, or a quarter of the files that the process may have open

	smallMessage = 16 << 10 // bytes: commands are smaller, and wait for no larger one
	largeAtOnce  = 4        // messages that are larger and read at once; of one peer, half of them
	decodeAtOnce = 2        // messages decoded at once

	readTimeout  = 30 * time.Second // for a whole request, on a bad link
	writeTimeout = 30 * time.Second // for an answer, from its first byte
	fetchTime    = time.Hour        // for a package, over a link of 10 kbit/s
	idleTimeout  = time.Minute      // between two requests of a connection
)

// A fault is an error with its code on the wire.
type fault struct {
	code int
	text string
}

func (f *fault) Error() string { return fmt.Sprintf("fault %d: %s", f.code, f.text) }

const (
	faultSyntax   = -32700 // not well-formed XML, or an encoding that is not known
	faultRequest  = -32600 // well-formed, but not an XML-RPC methodCall; too deep; too large
	faultMethod   = -32601 // no such method
	faultParams   = -32602 // wrong parameters
	faultInternal = -32603 // a defect in the agent
	faultBusy     = -32500 // the command can't be taken now
)

func faultf(code int, format string, args ...any) error {
	return &fault{code, oneLine(fmt.Sprintf(format, args...))}
}

// cut quotes a text that came from outside, and shortens it.
func cut(s string) string {
	const most = 80
	if len(s) > most {
		return fmt.Sprintf("%q...", s[:most])
	}
	return strconv.Quote(s)
}

// oneLine makes a text that came from outside fit for a line of a log.
func oneLine(s string) string {
	const most = 300
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) { // nor what only changes how the rest is shown
			return ' '
		}
		return r
	}, s)
}

// XML-RPC's types as Go has them: nil, bool, int (of 32 bits: int, i4, i2,
// i1), int64 (i8), float64, string, dateTime, []byte (base64), []any (array)
// and map[string]any (struct).

// typeName is what the specification calls the type of a value.
func typeName(v any) string {
	switch v.(type) {
	case nil:
		return "nil"
	case bool:
		return "boolean"
	case int64:
		return "i8"
	case float64:
		return "double"
	case dateTime:
		return "dateTime.iso8601"
	case []byte:
		return "base64"
	case []any:
		return "array"
	case map[string]any:
		return "struct"
	}
	return fmt.Sprintf("%T", v) // int, string
}

// A dateTime is a dateTime.iso8601 as it stands on the wire, most often
// without a zone: 20261122T20:43:21.
type dateTime string

const dateTimeLayout = "20060102T15:04:05"

// parseDateTime returns s if it is a date and a time that exist; a fraction
// and a zone may follow, and the parts may be split by '-' and ':'.
func parseDateTime(s string) (dateTime, error) {
	for _, date := range []string{"20060102", "2006-01-02"} {
		for _, clock := range []string{"T15:04:05", "T150405"} {
			for _, zone := range []string{"", "Z07:00", "Z0700", "Z07"} {
				if _, err := time.Parse(date+clock+zone, s); err == nil {
					return dateTime(s), nil
				}
			}
		}
	}
	return "", errors.New("not a date and time")
}

// parseDecimal reads a decimal number, 12, -0.5 or 1e6, that fits a float64.
// Nothing may stand around it.
func parseDecimal(s string) (float64, error) {
	if strings.Trim(s, "+-.eE0123456789") != "" || !strings.ContainsAny(s, "0123456789") {
		return 0, strconv.ErrSyntax // what ParseFloat takes besides: inf, nan, 0x1p-2, 1_000
	}
	return strconv.ParseFloat(s, 64)
}

// A decoder reads one XML-RPC message from encoding/xml's tokens. Its errors
// are faults: faultSyntax or faultRequest.
type decoder struct {
	xml    *xml.Decoder
	input  *tokenReader
	root   bool // the root element has begun
	values int
}

// newDecoder returns a decoder of a message in which no tag or text is longer
// than limit bytes.
func newDecoder(message []byte, limit int) *decoder {
	input := &tokenReader{Reader: bytes.NewReader(bytes.TrimPrefix(message, []byte("\xef\xbb\xbf"))), limit: limit, left: limit}
	d := &decoder{xml: xml.NewDecoder(input), input: input}
	d.xml.CharsetReader = charsetReader
	return d
}

// A tokenReader gives encoding/xml so many bytes for a token and no more.
type tokenReader struct {
	*bytes.Reader
	limit, left int
}

func (t *tokenReader) ReadByte() (byte, error) {
	if t.left == 0 {
		return 0, t.tooLong()
	}
	t.left--
	return t.Reader.ReadByte()
}

func (t *tokenReader) tooLong() error {
	return faultf(faultRequest, "a tag or text of more than %d bytes", t.limit)
}

func (t *tokenReader) Read(p []byte) (int, error) {
	if t.left == 0 {
		return 0, t.tooLong()
	}
	n, err := t.Reader.Read(p[:min(len(p), t.left)])
	t.left -= n
	return n, err
}

// charsetReader decodes the encodings, besides UTF-8, that old peers declare.
func charsetReader(label string, r io.Reader) (io.Reader, error) {
	switch strings.ToLower(label) {
	case "us-ascii", "ascii", "utf8": // parts or names of UTF-8
		return r, nil
	case "iso-8859-1", "iso8859-1", "latin1", "latin-1":
		return &latin1Reader{r: r}, nil
	}
	return nil, fmt.Errorf("unknown encoding %s", cut(label))
}

// A latin1Reader turns ISO-8859-1 into UTF-8.
type latin1Reader struct {
	r    io.Reader
	rest byte // the second byte of a character whose first was the last that fitted
}

func (l *latin1Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if l.rest != 0 {
		p[0], l.rest = l.rest, 0
		return 1, nil
	}
	in := make([]byte, (len(p)+1)/2)
	n, err := l.r.Read(in)
	out := p[:0]
	for _, c := range in[:n] {
		switch {
		case c < 0x80:
			out = append(out, c)
		case len(out)+1 < len(p):
			out = append(out, 0xc0|c>>6, 0x80|c&0x3f)
		default:
			out, l.rest = append(out, 0xc0|c>>6), 0x80|c&0x3f
		}
	}
	return len(out), err
}

// next returns the next token, or io.EOF behind the last one.
func (d *decoder) next() (xml.Token, error) {
	d.input.left = d.input.limit
	t, err := d.xml.Token()
	if f := (*fault)(nil); err == nil || errors.Is(err, io.EOF) || errors.As(err, &f) {
		return t, err
	}
	return nil, faultf(faultSyntax, "not well-formed XML: %v", err)
}

// token returns the next start element, end element or text. Comments,
// processing instructions and a DOCTYPE before the root are passed over.
func (d *decoder) token() (xml.Token, error) {
	for {
		first := d.xml.InputOffset() == 0
		t, err := d.next()
		if errors.Is(err, io.EOF) {
			err = faultf(faultSyntax, "not well-formed XML: there is no message")
		}
		if err != nil {
			return nil, err
		}
		switch t := t.(type) {
		case xml.Comment:
		case xml.ProcInst:
			if strings.EqualFold(t.Target, "xml") && !first {
				return nil, faultf(faultSyntax, "not well-formed XML: a declaration that is not at the start")
			}
		case xml.Directive:
			if d.root {
				return nil, faultf(faultSyntax, "not well-formed XML: a <!DOCTYPE> within the message")
			}
		case xml.CharData:
			if !d.root && len(bytes.TrimSpace(t)) > 0 {
				return nil, faultf(faultSyntax, "not well-formed XML: text before the message")
			}
			return t, nil
		default:
			d.root = true
			return t, nil
		}
	}
}

// tag returns the next element's start, or nil at the end of the one around
// it. Between tags there may be white space only.
func (d *decoder) tag() (*xml.StartElement, error) {
	for {
		t, err := d.token()
		if err != nil {
			return nil, err
		}
		switch t := t.(type) {
		case xml.StartElement:
			return &t, nil
		case xml.EndElement:
			return nil, nil
		case xml.CharData:
			if len(bytes.TrimSpace(t)) > 0 {
				return nil, faultf(faultRequest, "text %s between tags", cut(string(t)))
			}
		}
	}
}

// expect reads the start of the element name.
func (d *decoder) expect(name string) error {
	t, err := d.tag()
	switch {
	case err != nil:
		return err
	case t == nil:
		return faultf(faultRequest, "<%s> is missing", name)
	case t.Name.Local != name:
		return faultf(faultRequest, "<%s> where <%s> belongs", t.Name.Local, name)
	}
	return nil
}

// end reads the end of the element around.
func (d *decoder) end() error {
	t, err := d.tag()
	if err == nil && t != nil {
		err = faultf(faultRequest, "<%s> has no place here", t.Name.Local)
	}
	return err
}

// text reads the text up to the end of the element around.
func (d *decoder) text() (string, error) {
	var text []byte
	for {
		t, err := d.token()
		if err != nil {
			return "", err
		}
		switch t := t.(type) {
		case xml.StartElement:
			return "", faultf(faultRequest, "<%s> has no place here", t.Name.Local)
		case xml.EndElement:
			return string(text), nil
		case xml.CharData:
			text = append(text, t...)
		}
	}
}

// finish reads what follows the root element: nothing of meaning.
func (d *decoder) finish() error {
	for {
		t, err := d.next()
		switch t := t.(type) {
		case nil:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case xml.StartElement, xml.Directive:
			return faultf(faultSyntax, "not well-formed XML: something follows the message")
		case xml.CharData:
			if len(bytes.TrimSpace(t)) > 0 {
				return faultf(faultSyntax, "not well-formed XML: text follows the message")
			}
		}
	}
}

// value reads what <value> holds, and its end tag.
func (d *decoder) value(depth int) (any, error) {
	if d.values++; d.values > maxValues {
		return nil, faultf(faultRequest, "more than %d values", maxValues)
	}
	if depth > maxDepth {
		return nil, faultf(faultRequest, "nested deeper than %d levels", maxDepth)
	}
	var text []byte
	for {
		t, err := d.token()
		if err != nil {
			return nil, err
		}
		switch t := t.(type) {
		case xml.CharData:
			text = append(text, t...)
		case xml.EndElement:
			return string(text), nil // without a type it is a string
		case xml.StartElement:
			if len(bytes.TrimSpace(text)) > 0 {
				return nil, faultf(faultRequest, "text %s beside <%s>", cut(string(text)), t.Name.Local)
			}
			v, err := d.typed(t.Name.Local, depth)
			if err != nil {
				return nil, err
			}
			return v, d.end()
		}
	}
}

// typed reads a value of the type that an element's name says, and the
// element's end tag. The names with the prefix ex: are Apache's.
func (d *decoder) typed(name string, depth int) (any, error) {
	switch name {
	case "array":
		return d.array(depth)
	case "struct":
		return d.members(depth)
	}
	text, err := d.text()
	if err != nil {
		return nil, err
	}
	var v any
	trimmed := strings.TrimSpace(text)
	switch name {
	case "string":
		return text, nil
	case "int", "i4", "i2", "i1":
		bits := map[string]int{"int": 32, "i4": 32, "i2": 16, "i1": 8}[name]
		var n int64
		n, err = strconv.ParseInt(trimmed, 10, bits)
		v = int(n)
	case "i8", "biginteger":
		v, err = strconv.ParseInt(trimmed, 10, 64)
	case "boolean":
		v = trimmed == "1"
		if trimmed != "1" && trimmed != "0" {
			err = errors.New("neither 1 nor 0")
		}
	case "double", "float", "bigdecimal":
		v, err = parseDecimal(trimmed)
	case "dateTime.iso8601", "dateTime":
		v, err = parseDateTime(trimmed)
	case "base64":
		v, err = base64.StdEncoding.DecodeString(strings.Join(strings.Fields(text), ""))
	case "nil":
		if trimmed != "" {
			err = errors.New("not empty")
		}
	default:
		return nil, faultf(faultRequest, "no such type: <%s>", name)
	}
	if err != nil {
		var number *strconv.NumError
		if errors.As(err, &number) {
			err = number.Err
		}
		return nil, faultf(faultRequest, "bad <%s> %s: %v", name, cut(text), err)
	}
	return v, nil
}

func (d *decoder) array(depth int) (any, error) {
	if err := d.expect("data"); err != nil {
		return nil, err
	}
	list := []any{}
	for {
		t, err := d.tag()
		if err != nil {
			return nil, err
		}
		if t == nil {
			return list, d.end()
		}
		if t.Name.Local != "value" {
			return nil, faultf(faultRequest, "<%s> where <value> belongs", t.Name.Local)
		}
		v, err := d.value(depth + 1)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
}

func (d *decoder) members(depth int) (any, error) {
	members := map[string]any{}
	for {
		t, err := d.tag()
		if err != nil {
			return nil, err
		}
		if t == nil {
			return members, nil
		}
		if t.Name.Local != "member" {
			return nil, faultf(faultRequest, "<%s> where <member> belongs", t.Name.Local)
		}
		if err := d.expect("name"); err != nil {
			return nil, err
		}
		name, err := d.text()
		if err != nil {
			return nil, err
		}
		if err := d.expect("value"); err != nil {
			return nil, err
		}
		if members[name], err = d.value(depth + 1); err != nil {
			return nil, err
		}
		if err := d.end(); err != nil {
			return nil, err
		}
	}
}

// params reads what <params> holds, and its end tag.
func (d *decoder) params() ([]any, error) {
	params := []any{}
	for {
		t, err := d.tag()
		if err != nil || t == nil {
			return params, err
		}
		if t.Name.Local != "param" {
			return nil, faultf(faultRequest, "<%s> where <param> belongs", t.Name.Local)
		}
		if err := d.expect("value"); err != nil {
			return nil, err
		}
		v, err := d.value(1)
		if err != nil {
			return nil, err
		}
		if err := d.end(); err != nil {
			return nil, err
		}
		params = append(params, v)
	}
}

// decodeCall reads a methodCall.
func decodeCall(message []byte) (method string, params []any, err error) {
	d := newDecoder(message, maxToken)
	if err := d.expect("methodCall"); err != nil {
		return "", nil, err
	}
	if err := d.expect("methodName"); err != nil {
		return "", nil, err
	}
	name, err := d.text()
	if err != nil {
		return "", nil, err
	}
	if method = strings.TrimSpace(name); method == "" {
		return "", nil, faultf(faultRequest, "<methodName> is empty")
	}
	t, err := d.tag()
	if err != nil {
		return "", nil, err
	}
	if t != nil { // without parameters <params> may be left out
		if t.Name.Local != "params" {
			return "", nil, faultf(faultRequest, "<%s> where <params> belongs", t.Name.Local)
		}
		if params, err = d.params(); err != nil {
			return "", nil, err
		}
		if err := d.end(); err != nil {
			return "", nil, err
		}
	}
	return method, params, d.finish()
}

// decodeResponse reads a methodResponse: its value (nil where it has none),
// or as the error the fault that the peer sent. Any other error is no *fault:
// the message was no response.
func decodeResponse(message []byte) (any, error) {
	v, sent, err := newDecoder(message, maxMessage).response()
	if err != nil {
		return nil, errors.New(err.(*fault).text)
	}
	if sent != nil {
		return nil, sent
	}
	return v, nil
}

func (d *decoder) response() (v any, sent *fault, err error) {
	if err := d.expect("methodResponse"); err != nil {
		return nil, nil, err
	}
	t, err := d.tag()
	if err != nil {
		return nil, nil, err
	}
	switch {
	case t != nil && t.Name.Local == "params":
		params, err := d.params()
		if err != nil {
			return nil, nil, err
		}
		if len(params) > 0 {
			v = params[0]
		}
	case t != nil && t.Name.Local == "fault":
		if err := d.expect("value"); err != nil {
			return nil, nil, err
		}
		v, err := d.value(1)
		if err != nil {
			return nil, nil, err
		}
		if err := d.end(); err != nil {
			return nil, nil, err
		}
		members, _ := v.(map[string]any) // whatever is in it, it is a fault
		sent = &fault{}
		if code, ok := members["faultCode"]; ok {
			sent.code, _ = strconv.Atoi(fmt.Sprint(code))
		}
		if text, ok := members["faultString"]; ok {
			sent.text = oneLine(fmt.Sprint(text))
		}
	default:
		return nil, nil, faultf(faultRequest, "neither <params> nor <fault>")
	}
	if err := d.end(); err != nil {
		return nil, nil, err
	}
	return v, sent, d.finish()
}

const xmlDeclaration = `<?xml version="1.0"?>`

// encodeCall returns a methodCall in UTF-8. Characters that XML 1.0 cannot
// hold become U+FFFD, here and in every other message.
func encodeCall(method string, params ...any) []byte {
	var b bytes.Buffer
	b.WriteString(xmlDeclaration + "<methodCall><methodName>")
	writeText(&b, method)
	b.WriteString("</methodName><params>")
	for _, p := range params {
		b.WriteString("<param>")
		writeValue(&b, p)
		b.WriteString("</param>")
	}
	b.WriteString("</params></methodCall>")
	return b.Bytes()
}

// encodeResponse returns a methodResponse: a fault where err is not nil.
func encodeResponse(v any, err error) []byte {
	var b bytes.Buffer
	b.WriteString(xmlDeclaration + "<methodResponse>")
	if err != nil {
		b.WriteString("<fault>")
		writeValue(&b, faultStruct(err))
		b.WriteString("</fault>")
	} else {
		b.WriteString("<params><param>")
		writeValue(&b, v)
		b.WriteString("</param></params>")
	}
	b.WriteString("</methodResponse>")
	return b.Bytes()
}

// faultStruct is a fault as a value; an error that is none is a defect.
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
	case bool:
		n := "0"
		if v {
			n = "1"
		}
		b.WriteString("<boolean>" + n + "</boolean>")
	case int:
		b.WriteString("<int>" + strconv.Itoa(v) + "</int>")
	case int64:
		b.WriteString("<i8>" + strconv.FormatInt(v, 10) + "</i8>")
	case float64:
		b.WriteString("<double>" + strconv.FormatFloat(v, 'f', -1, 64) + "</double>")
	case string:
		b.WriteString("<string>")
		writeText(b, v)
		b.WriteString("</string>")
	case dateTime:
		b.WriteString("<dateTime.iso8601>")
		writeText(b, string(v))
		b.WriteString("</dateTime.iso8601>")
	case []byte:
		b.WriteString("<base64>" + base64.StdEncoding.EncodeToString(v) + "</base64>")
	case []any:
		b.WriteString("<array><data>")
		for _, e := range v {
			writeValue(b, e)
		}
		b.WriteString("</data></array>")
	case map[string]any:
		b.WriteString("<struct>")
		for _, name := range sortedKeys(v) {
			b.WriteString("<member><name>")
			writeText(b, name)
			b.WriteString("</name>")
			writeValue(b, v[name])
			b.WriteString("</member>")
		}
		b.WriteString("</struct>")
	default:
		panic(fmt.Sprintf("%T has no XML-RPC type", v))
	}
	b.WriteString("</value>")
}

func writeText(b *bytes.Buffer, s string) {
	xml.EscapeText(b, []byte(s)) // writing to a Buffer cannot fail
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// A method is one name on the wire.
type method struct {
	name       string
	signatures string // "string int string, string string string": what it returns, then what it takes
	help       string
	call       func(r request, params []any) (any, error)
}

// A request says where a call comes from and since when it is being answered.
type request struct {
	ctx      context.Context // ends when the connection has to give way
	peer     string          // host
	received time.Time
}

// An access says who may call, and how.
type access struct {
	allow []netip.Prefix // empty: everybody
	tls   *tls.Config    // nil: without TLS
}

// allows reports whether a host may call. IPv4 in IPv6 is IPv4.
func (a *access) allows(host string) bool {
	addr, err := netip.ParseAddr(host)
	addr = addr.Unmap().WithZone("")
	return len(a.allow) == 0 || err == nil && slices.ContainsFunc(a.allow, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// hostOf is the host of a peer's address.
func hostOf(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return address
}

// neighbours names who shares limits with a host: of IPv6, its network of 64
// bits, as everybody has one to himself.
func neighbours(host string) string {
	addr, err := netip.ParseAddr(host)
	if addr = addr.Unmap().WithZone(""); err != nil || addr.Is4() {
		return addr.String()
	}
	prefix, _ := addr.Prefix(64) // which it has
	return prefix.String()
}

// certificateTime is the time that certificates are checked by: the clock's,
// but never before the program was built, as a box may boot in 1970.
func certificateTime(now, built time.Time) time.Time {
	if now.Before(built) {
		return built
	}
	return now
}

// newTLS returns what is common to all that the agent does over TLS.
func newTLS(built time.Time) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, Time: func() time.Time { return certificateTime(time.Now(), built) }}
}

// bearsName reports whether a certificate is of a name: its subject, the
// subject's common name or one of the alternative names.
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

// A handler answers XML-RPC calls over HTTP. Besides its methods it has
// those of introspection.
type handler struct {
	methods  map[string]method
	refused  logLimit
	decoding chan struct{} // one is taken while a message is decoded

	http  *http.Server
	count atomic.Int64 // refused

	mu     sync.Mutex // guards what is below
	access *access
	conns  map[net.Conn]*connState
	most   int            // connections at once
	large  map[string]int // messages larger than most that are read or answered, by whose they are
	freed  chan struct{}  // closed, and made anew, when another may be
}

// A connState is what is known of a connection.
type connState struct {
	access  *access         // what was in force when it came
	host    string          // its peer
	from    string          // its peer's neighbours
	barred  bool            // nothing that it asks is answered
	since   time.Time       // when it came, or the latest call on it began or ended
	working bool            // a call is being answered on it
	ctx     context.Context // of that
	cancel  context.CancelFunc
}

// newHandler returns a handler that answers everybody, without TLS.
func newHandler(methods []method) *handler {
	h := &handler{
		methods:  make(map[string]method),
		refused:  logLimit{burst: 20, perSecond: 0.2},
		large:    make(map[string]int),
		freed:    make(chan struct{}),
		decoding: make(chan struct{}, decodeAtOnce),
		access:   &access{},
		conns:    make(map[net.Conn]*connState),
		most:     maxConns,
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil && files.Cur < 4*maxConns {
		h.most = max(1, int(files.Cur)/4)
	}
	h.http = &http.Server{
		Handler:                      h,
		ReadTimeout:                  readTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeader - 4096, // net/http reads 4096 more
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     log.New(refusals{h}, "", 0), // mostly what peers do wrong
		ConnContext:                  func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
		ConnState:                    h.connChanged,
	}
	for _, m := range append(methods, h.introspection()...) {
		h.methods[m.name] = m
	}
	return h
}

type connKey struct{}

// Refusals take what net/http logs: each is a peer that was not served.
type refusals struct{ *handler }

func (r refusals) Write(p []byte) (int, error) {
	r.refuse("%s", oneLine(strings.TrimSpace(string(p))))
	return len(p), nil
}

// refuse counts and logs what was not done.
func (h *handler) refuse(format string, args ...any) {
	h.count.Add(1)
	h.refused.printf(warning+format, args...)
}

// serve answers the calls that come in until the listener or the server is
// closed. There are limits on all that a peer can send.
func (h *handler) serve(l net.Listener) error { return h.http.Serve(gate{l, h}) }

// A gate is a listener whose connections are what the handler's access says.
type gate struct {
	net.Listener
	h *handler
}

func (g gate) Accept() (net.Conn, error) {
	c, err := g.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return g.h.admit(c), nil
}

// admit takes a connection in. Of more than 64 one gives way.
func (h *handler) admit(c net.Conn) net.Conn {
	h.mu.Lock()
	defer h.mu.Unlock()
	host := hostOf(c.RemoteAddr().String())
	s := &connState{access: h.access, host: host, from: neighbours(host), barred: !h.access.allows(host), since: time.Now()}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if h.access.tls != nil {
		c = tls.Server(c, h.access.tls)
	}
	h.conns[c] = s
	if len(h.conns) > h.most {
		weakest := h.weakest(c)
		h.refuse("%s: connection closed: more than %d", h.conns[weakest].host, h.most)
		h.drop(weakest)
	}
	return c
}

// drop closes a connection and ends the call on it.
func (h *handler) drop(c net.Conn) {
	h.conns[c].cancel()
	delete(h.conns, c)
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn() // its own Close says farewell, which may take a while
	}
	c.Close()
}

// weakest is the connection that gives way to the newest: one that may not call,
// else one of the neighbourhood, and there of the host, that holds most, where
// that is more than a sixteenth of all. So nobody keeps the monitor out by
// holding many. Of the others it is the one that has been without a call for
// longest, else the one whose call is the latest.
func (h *handler) weakest(newest net.Conn) (weakest net.Conn) {
	byFrom, byHost := make(map[string]int), make(map[string]int)
	for _, s := range h.conns {
		byFrom[s.from]++
		byHost[s.host]++
	}
	fair := h.most / 16
	before := func(a, b *connState) bool {
		from, from2 := max(byFrom[a.from], fair), max(byFrom[b.from], fair)
		host, host2 := max(byHost[a.host], fair), max(byHost[b.host], fair)
		switch {
		case a.barred != b.barred:
			return a.barred
		case from != from2:
			return from > from2
		case host != host2:
			return host > host2
		case a == h.conns[newest] || b == h.conns[newest]:
			return b == h.conns[newest]
		case a.working != b.working:
			return b.working
		case a.working:
			return a.since.After(b.since)
		}
		return a.since.Before(b.since)
	}
	for c, s := range h.conns {
		if weakest == nil || before(s, h.conns[weakest]) {
			weakest = c
		}
	}
	return weakest
}

// rules are who may call at present, and how.
func (h *handler) rules() *access {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.access
}

// setAccess changes who may call, and how. Where the rules for TLS are others,
// connections that came under those before end, the ones with a call on them when
// it is answered.
func (h *handler) setAccess(a *access) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.access = a
	for c, s := range h.conns {
		if !s.working && s.access.tls != a.tls {
			h.drop(c)
		}
	}
}

func (h *handler) connChanged(c net.Conn, state http.ConnState) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.conns[c]
	if s == nil {
		return
	}
	switch state {
	case http.StateIdle:
		s.since = time.Now()
	case http.StateClosed, http.StateHijacked:
		s.cancel()
		delete(h.conns, c)
	}
}

// begin notes that a call on the request's connection is being answered, and
// returns a context that ends when it has to give way. It reports false where
// the connection came under rules that are no longer in force.
func (h *handler) begin(r *http.Request) (ctx context.Context, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c, ok := r.Context().Value(connKey{}).(net.Conn)
	if !ok { // another server's
		return r.Context(), true
	}
	s := h.conns[c]
	if s == nil || s.access.tls != h.access.tls {
		return nil, false
	}
	s.working, s.since = true, time.Now()
	return s.ctx, true
}

// end notes that it was answered, and reports whether the connection may stay.
func (h *handler) end(r *http.Request) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	c, ok := r.Context().Value(connKey{}).(net.Conn)
	if !ok {
		return true
	}
	s := h.conns[c]
	if s == nil {
		return false
	}
	s.working, s.since = false, time.Now()
	return s.access.tls == h.access.tls
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	status, answer := h.answer(w, r)
	if !h.end(r) {
		w.Header().Set("Connection", "close")
	}
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	if status != http.StatusOK {
		h.refuse("%s: %s %s: HTTP %d", hostOf(r.RemoteAddr), cut(r.Method), cut(r.URL.Path), status)
		http.Error(w, http.StatusText(status), status)
		return
	}
	w.Header().Set("Content-Type", "text/xml")
	w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	w.Write(answer) // a peer that has gone does not want it
}

// answer returns the HTTP status and, with 200, the methodResponse.
func (h *handler) answer(w http.ResponseWriter, r *http.Request) (status int, answer []byte) {
	if !h.rules().allows(hostOf(r.RemoteAddr)) {
		w.Header().Set("Connection", "close") // so that net/http does not read the body either
		return http.StatusForbidden, nil
	}
	switch r.URL.Path {
	case "/xmlrpc", "/xmlrpc/", "/RPC2", "/":
	default:
		return http.StatusNotFound, nil
	}
	encoding := r.Header.Get("Content-Encoding")
	switch {
	case r.Method != http.MethodPost:
		w.Header().Set("Allow", http.MethodPost)
		return http.StatusMethodNotAllowed, nil
	case r.Header.Get("Content-Length") == "" && len(r.TransferEncoding) == 0:
		return http.StatusLengthRequired, nil
	case encoding != "" && !strings.EqualFold(encoding, "identity"):
		return http.StatusUnsupportedMediaType, nil
	case r.ContentLength > maxMessage:
		return http.StatusRequestEntityTooLarge, nil
	}
	message, done, err := h.readMessage(w, r)
	defer done()
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return http.StatusRequestEntityTooLarge, nil
	case err != nil:
		return http.StatusBadRequest, nil // broken off, broken chunks, out of time
	}
	http.NewResponseController(w).SetReadDeadline(time.Time{}) // it would end the call, too
	ctx, ok := h.begin(r)
	if !ok {
		panic(http.ErrAbortHandler) // as if the connection had been closed a moment before
	}
	h.decoding <- struct{}{}
	name, params, err := decodeCall(message)
	<-h.decoding
	peer := hostOf(r.RemoteAddr)
	if err != nil {
		h.refuse("%s: %v", peer, err)
		return http.StatusOK, encodeResponse(nil, err)
	}
	return http.StatusOK, encodeResponse(h.call(request{ctx, peer, time.Now()}, name, params))
}

// readMessage reads the body of a request. Many small ones are read at once,
// but few large ones: together they could take more memory than there is.
func (h *handler) readMessage(w http.ResponseWriter, r *http.Request) (message []byte, done func(), err error) {
	done = func() {}
	body := http.MaxBytesReader(w, r.Body, maxMessage)
	message, err = io.ReadAll(io.LimitReader(body, smallMessage))
	if err != nil || len(message) < smallMessage {
		return message, done, err
	}
	from := neighbours(hostOf(r.RemoteAddr))
	if !h.beginLarge(from) {
		return nil, done, errors.New("too many large messages at once")
	}
	done = func() { h.endLarge(from) }
	rest, err := io.ReadAll(body)
	return append(message, rest...), done, err
}

// beginLarge waits until one more large message may be read: there are four at
// once, and two of one neighbourhood, as whoever sends one slowly takes long. It
// reports false where that does not come about in the time that a request has.
func (h *handler) beginLarge(from string) bool {
	timeout := time.NewTimer(readTimeout)
	defer timeout.Stop()
	for {
		h.mu.Lock()
		all := 0
		for _, n := range h.large {
			all += n
		}
		free, freed := all < largeAtOnce && h.large[from] < largeAtOnce/2, h.freed
		if free {
			h.large[from]++
		}
		h.mu.Unlock()
		if free {
			return true
		}
		select {
		case <-freed:
		case <-timeout.C:
			return false
		}
	}
}

func (h *handler) endLarge(from string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.large[from]--; h.large[from] == 0 {
		delete(h.large, from)
	}
	close(h.freed)
	h.freed = make(chan struct{})
}

// call runs one method. Its error is a fault, and logged; so is a panic.
func (h *handler) call(r request, name string, params []any) (v any, err error) {
	defer func() {
		if p := recover(); p != nil {
			v, err = nil, fmt.Errorf("%v\n%s", p, debug.Stack())
		}
		f := (*fault)(nil)
		switch {
		case errors.As(err, &f):
			h.refuse("%s: %s: %v", r.peer, cut(name), err)
		case err != nil:
			log.Printf(severe+"%s: %s: defect: %v", r.peer, cut(name), err)
			err = faultf(faultInternal, "internal error")
		}
	}()
	m, ok := h.methods[name]
	if !ok {
		return nil, faultf(faultMethod, "no such method: %s", cut(name))
	}
	return m.call(r, params)
}

// introspection is what every XML-RPC server has under system.
func (h *handler) introspection() []method {
	return []method{
		{"system.listMethods", "array", "The names of all methods.", func(_ request, params []any) (any, error) {
			if len(params) != 0 {
				return nil, faultf(faultParams, "system.listMethods takes no parameters")
			}
			names := []any{}
			for _, name := range sortedKeys(h.methods) {
				names = append(names, name)
			}
			return names, nil
		}},
		{"system.methodHelp", "string string", "What a method does.", func(_ request, params []any) (any, error) {
			m, err := h.named("system.methodHelp", params)
			return m.help, err
		}},
		{"system.methodSignature", "array string", "For each way to call a method: the type that it returns, then those of its parameters.", func(_ request, params []any) (any, error) {
			m, err := h.named("system.methodSignature", params)
			if err != nil {
				return nil, err
			}
			signatures := []any{}
			for _, signature := range strings.Split(m.signatures, ", ") {
				types := []any{}
				for _, t := range strings.Fields(signature) {
					types = append(types, t)
				}
				signatures = append(signatures, types)
			}
			return signatures, nil
		}},
		{"system.multicall", "array array", "Calls several methods, each a struct of methodName and params; for each there is an array of its one result, or the struct of a fault.", h.multicall},
		{"system.getCapabilities", "struct", "The specifications that are followed.", func(_ request, params []any) (any, error) {
			if len(params) != 0 {
				return nil, faultf(faultParams, "system.getCapabilities takes no parameters")
			}
			return map[string]any{
				"xmlrpc":           capability("http://www.xmlrpc.com/spec", 1),
				"introspection":    capability("http://xmlrpc-c.sourceforge.net/introspection.html", 1),
				"system.multicall": capability("http://www.xmlrpc.com/discuss/msgReader$1208", 1),
				"faults_interop":   capability("http://xmlrpc-epi.sourceforge.net/specs/rfc.fault_codes.php", 20010516),
				"nil":              capability("http://ontosys.com/xml-rpc/extensions.php", 20010518),
			}, nil
		}},
	}
}

func capability(specification string, version int) map[string]any {
	return map[string]any{"specUrl": specification, "specVersion": version}
}

// named returns the method that the only parameter names.
func (h *handler) named(caller string, params []any) (method, error) {
	if len(params) == 1 {
		if name, ok := params[0].(string); ok {
			if m, ok := h.methods[name]; ok {
				return m, nil
			}
			return method{}, faultf(faultParams, "no such method: %s", cut(name))
		}
	}
	return method{}, faultf(faultParams, "%s takes the name of a method", caller)
}

func (h *handler) multicall(r request, params []any) (any, error) {
	var calls []any
	if len(params) == 1 {
		calls, _ = params[0].([]any)
	}
	switch {
	case calls == nil:
		return nil, faultf(faultParams, "system.multicall takes an array of structs")
	case len(calls) > maxCalls:
		return nil, faultf(faultParams, "system.multicall takes at most %d calls", maxCalls)
	}
	results, size := []any{}, 0
	for _, c := range calls {
		call, _ := c.(map[string]any)
		name, ok := call["methodName"].(string)
		params, ok2 := call["params"].([]any)
		var v any
		err := faultf(faultParams, "not a struct of methodName and params")
		switch {
		case name == "system.multicall":
			err = faultf(faultParams, "system.multicall cannot call itself")
		case ok && (ok2 || call["params"] == nil):
			v, err = h.call(r, name, params)
		}
		if err == nil {
			if size += len(encodeResponse(v, nil)); size > maxMessage {
				return nil, faultf(faultRequest, "the results are larger than %d bytes: call fewer methods at once", maxMessage)
			}
		}
		if err != nil {
			results = append(results, faultStruct(err))
		} else {
			results = append(results, []any{v})
		}
	}
	return results, nil
}

// A client calls the XML-RPC methods of one URL. It follows no redirect and
// asks no proxy: what it sends goes to that URL or nowhere.
//
// What comes back is read by net/http. The few lines that go out, and the one
// connection, are the client's own: net/http's hands each call to two more
// goroutines, which is half the time of a delivery, and makes the binary a
// twentieth larger.
type client struct {
	url     *url.URL
	timeout time.Duration // of a call as a whole
	tls     *tls.Config
	idle    time.Duration // that a connection waits for another call
	head    string        // of each request

	mu     sync.Mutex // guards what is below
	kept   *link      // nil: none
	since  time.Time  // when it was
	expiry *time.Timer
}

// A link is a connection of a client.
type link struct {
	net.Conn
	tcp     *net.TCPConn // what is under it
	limited io.LimitedReader
	r       *bufio.Reader
}

// newClient returns a client whose calls take at most the timeout, each as a
// whole, with the rules for https (nil: newTLS's).
func newClient(u *url.URL, timeout time.Duration, config *tls.Config) *client {
	if config == nil {
		config = newTLS(time.Time{})
	}
	host := strings.TrimSuffix(u.Host, ":")
	if zone, end := strings.IndexByte(host, '%'), strings.IndexByte(host, ']'); 0 < zone && zone < end { // it means nothing elsewhere
		host = host[:zone] + host[end:]
	}
	c := &client{
		url: u, timeout: timeout, tls: config,
		idle: 200 * time.Millisecond, // between two readings of a burst; a monitor that serves one connection waits for its end
		head: "POST " + u.RequestURI() + " HTTP/1.1\r\nHost: " + host + "\r\nUser-Agent: picket\r\nContent-Type: text/xml\r\n",
	}
	if u.User != nil {
		password, _ := u.User.Password()
		c.head += "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(u.User.Username()+":"+password)) + "\r\n"
	}
	return c
}

// close closes the connection that waits for another call.
func (c *client) close() {
	if l := c.take(); l != nil {
		l.Close()
	}
}

// expire closes it when it has waited for long enough.
func (c *client) expire() {
	c.mu.Lock()
	enough := c.kept != nil && time.Since(c.since) >= c.idle
	c.mu.Unlock()
	if enough {
		c.close()
	}
}

// take takes the connection that waits, if there is one. It is of no use where the
// peer has said anything since its last answer: that it ends, or more than it was
// asked.
func (c *client) take() *link {
	c.mu.Lock()
	l := c.kept
	c.kept = nil
	c.mu.Unlock()
	if l != nil && !l.quiet() {
		l.tcp.Close()
		return nil
	}
	return l
}

// keep has a connection wait for another call; one is enough.
func (c *client) keep(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.kept != nil {
		l.tcp.Close()
		return
	}
	c.kept, c.since = l, time.Now()
	if c.expiry == nil {
		c.expiry = time.AfterFunc(c.idle, c.expire)
	} else {
		c.expiry.Reset(c.idle)
	}
}

// call calls a method and returns its result. The error is a *fault exactly
// when the peer answered with one.
func (c *client) call(ctx context.Context, name string, params ...any) (v any, err error) {
	err = c.post(ctx, name, params, func(_ *link, body io.Reader) (err error) {
		v, err = readResponse(body)
		return err
	})
	return v, err
}

// post sends a call, and has read take the body of an answer whose HTTP status
// is a success.
func (c *client) post(ctx context.Context, name string, params []any, read func(*link, io.Reader) error) error {
	body := encodeCall(name, params...)
	request := make([]byte, 0, len(c.head)+len(body)+32)
	request = append(request, c.head...)
	request = append(request, "Content-Length: "...)
	request = strconv.AppendInt(request, int64(len(body)), 10)
	request = append(request, "\r\n\r\n"...)
	request = append(request, body...)
	if err := ctx.Err(); err != nil {
		return err // nothing is sent
	}
	deadline := time.Now().Add(c.timeout)
	if l := c.take(); l != nil {
		answered, err := c.exchange(ctx, l, deadline, request, read)
		if answered || !hungUp(err) {
			return err
		}
	}
	l, err := c.dial(ctx, deadline)
	if err != nil {
		return err
	}
	_, err = c.exchange(ctx, l, deadline, request, read)
	return err
}

// hungUp reports whether an error says that the peer had closed the connection.
func hungUp(err error) bool {
	for _, e := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// dial makes a connection to the host of the URL.
func (c *client) dial(ctx context.Context, deadline time.Time) (*link, error) {
	port := c.url.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[c.url.Scheme]
	}
	conn, err := (&net.Dialer{Deadline: deadline}).DialContext(ctx, "tcp", net.JoinHostPort(c.url.Hostname(), port))
	if err != nil {
		return nil, err
	}
	l := &link{Conn: conn, tcp: conn.(*net.TCPConn)}
	if c.url.Scheme == "https" {
		config := c.tls.Clone()
		if config.ServerName == "" {
			config.ServerName, _, _ = strings.Cut(c.url.Hostname(), "%") // without a zone
		}
		conn.SetDeadline(deadline)
		t := tls.Client(conn, config)
		if err := t.HandshakeContext(ctx); err != nil {
			conn.Close()
			return nil, err
		}
		l.Conn = t
	}
	l.limited.R = l.Conn
	l.r = bufio.NewReader(&l.limited)
	return l, nil
}

// quiet reports whether nothing has come over the connection since the last answer.
func (l *link) quiet() bool {
	raw, err := l.tcp.SyscallConn()
	if err != nil || l.r.Buffered() > 0 {
		return false
	}
	var said error
	err = raw.Control(func(fd uintptr) {
		_, _, said = syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	})
	if err != nil || !errors.Is(said, syscall.EAGAIN) {
		return false
	}
	l.SetReadDeadline(time.Unix(1, 0))
	_, err = l.r.Peek(1) // what TLS has of it already
	return errors.Is(err, os.ErrDeadlineExceeded)
}

// exchange sends a request and has its answer read, by the deadline. It keeps
// the connection where that can serve another call, else closes it. It reports
// whether anything was answered.
func (c *client) exchange(ctx context.Context, l *link, deadline time.Time, request []byte, read func(*link, io.Reader) error) (answered bool, err error) {
	stop := context.AfterFunc(ctx, func() { l.tcp.Close() })
	l.SetDeadline(deadline)
	answered, reusable, err := l.exchange(deadline, request, read)
	if !stop() { // the connection is closed, but perhaps all had come
		reusable = false
		if f := (*fault)(nil); err != nil && !errors.As(err, &f) {
			err = ctx.Err()
		}
	}
	if err == nil && reusable {
		c.keep(l)
	} else {
		l.Close()
	}
	return answered, err
}

func (l *link) exchange(deadline time.Time, request []byte, read func(*link, io.Reader) error) (answered, reusable bool, err error) {
	if _, err := l.Write(request); err != nil {
		return false, false, err
	}
	l.limited.N = maxHeader
	if _, err := l.r.Peek(1); err != nil {
		return false, false, err
	}
	var resp *http.Response
	for resp == nil || resp.StatusCode/100 == 1 && resp.StatusCode != http.StatusSwitchingProtocols {
		if resp, err = http.ReadResponse(l.r, nil); err != nil {
			switch {
			case l.limited.N <= 0:
				err = fmt.Errorf("a header of more than %d bytes", maxHeader)
			case !time.Now().Before(deadline): // net/http complains of the half that has come
				err = os.ErrDeadlineExceeded
			}
			return true, false, err
		}
	}
	if resp.StatusCode/100 != 2 {
		return true, false, fmt.Errorf("HTTP %s", cut(resp.Status))
	}
	l.limited.N = math.MaxInt64
	body := &endReader{r: resp.Body}
	err = read(l, body)
	return true, body.ended && !resp.Close && l.r.Buffered() == 0, err
}

// An endReader notes that the end was reached.
type endReader struct {
	r     io.Reader
	ended bool
}

func (e *endReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	e.ended = e.ended || errors.Is(err, io.EOF)
	return n, err
}

func readResponse(r io.Reader) (any, error) {
	message, err := io.ReadAll(io.LimitReader(r, maxMessage+1))
	if err != nil {
		return nil, err
	}
	if len(message) > maxMessage {
		return nil, fmt.Errorf("answer longer than %d bytes", maxMessage)
	}
	return decodeResponse(message)
}

// fetch calls a method whose result is base64, and writes what that stands for
// while it arrives: only a few KiB are in memory. It takes as long as it
// takes, but ends where nothing has come for the client's timeout, after an
// hour, and where there is more than a result of limit bytes needs.
func (c *client) fetch(ctx context.Context, to io.Writer, limit int64, name string, params ...any) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	buffered := bufio.NewWriterSize(to, 32<<10)
	err := c.post(ctx, name, params, func(l *link, body io.Reader) error {
		moved := func() { l.SetDeadline(time.Now().Add(c.timeout)) }
		return readBase64Response(&movingReader{body, 2*limit + maxMessage, moved}, buffered)
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("nothing has come for %v", c.timeout)
	}
	if err != nil {
		return err
	}
	return buffered.Flush()
}

// A movingReader says when something has come, and does not take it for ever.
type movingReader struct {
	r     io.Reader
	left  int64
	moved func()
}

func (m *movingReader) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	if m.left -= int64(n); m.left < 0 {
		return 0, errors.New("the answer is far longer than it may be")
	}
	if n > 0 {
		m.moved()
	}
	return n, err
}

// readBase64Response decodes the one base64 of a response to a writer. The
// rest of the response, which a few hundred bytes are enough for, is checked
// like any other.
func readBase64Response(r io.Reader, to io.Writer) error {
	filter := &base64Filter{r: bufio.NewReader(r), to: to}
	v, err := readResponse(filter)
	if err != nil {
		return err
	}
	if rest, ok := v.([]byte); !ok || len(rest) > 0 || !filter.found {
		return fmt.Errorf("got %s; want one piece of base64", typeName(v))
	}
	return nil
}

// A base64Filter passes an XML text through, but for the first text in a
// <base64>: that is decoded and written elsewhere.
type base64Filter struct {
	r     *bufio.Reader
	to    io.Writer
	rest  []byte // read, but not passed through yet
	found bool
	err   error
}

func (f *base64Filter) Read(p []byte) (int, error) {
	for len(f.rest) == 0 {
		if f.err != nil {
			return 0, f.err
		}
		f.rest, f.err = f.r.ReadSlice('>') // valid until the next call
		if errors.Is(f.err, bufio.ErrBufferFull) {
			f.err = nil
		}
		if !f.found && bytes.HasSuffix(f.rest, []byte("<base64>")) {
			f.found = true
			f.rest = bytes.Clone(f.rest)
			if _, err := io.Copy(f.to, base64.NewDecoder(base64.StdEncoding, &textReader{f.r})); err != nil {
				f.err = err
			}
		}
	}
	n := copy(p, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}

// A textReader reads up to the next tag, and leaves out white space.
type textReader struct{ r *bufio.Reader }

func (t *textReader) Read(p []byte) (n int, err error) {
	for n < len(p) {
		c, err := t.r.ReadByte()
		switch {
		case err != nil:
			return n, err
		case c == '<':
			t.r.UnreadByte() // which was just read
			return n, io.EOF
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
		default:
			p[n] = c
			n++
		}
	}
	return n, nil
}

// plural is 1 reading, 2 readings.
func plural(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprint(n, " ", noun)
}

// What a line of the log may begin with: how severe it is, as syslog counts.
// The writer of the log takes it away again; without it a line is information.
const (
	severe  = "<3>"
	warning = "<4>"
	notice  = "<5>"
)

// A logLimit logs lines that outsiders cause: a burst of them, then so many a
// second, and how many it left out.
type logLimit struct {
	burst, perSecond float64

	mu    sync.Mutex // guards what is below
	spent float64
	last  time.Time
	left  int
}

func (l *logLimit) printf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
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
