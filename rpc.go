package main

// All that crosses the wire: the XML-RPC codec, the handler that answers the
// monitor's commands, the client that calls the monitor, and the road that
// readings take to it. It knows no sensor.
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
	"hash/crc32"
	"io"
	"log"
	"math"
	"math/rand"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
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

// plural is 1 reading, 2 readings.
func plural(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprint(n, " ", noun)
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
