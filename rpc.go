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
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
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
	maxConns   = 64        // connections open at once

	smallMessage = 16 << 10 // bytes: commands are smaller, and wait for no larger one
	largeAtOnce  = 4        // messages that are larger and read at once
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
	peer     string
	received time.Time
}

// A handler answers XML-RPC calls over HTTP. Besides its methods it has
// those of introspection.
type handler struct {
	methods  map[string]method
	refused  logLimit
	large    chan struct{} // one is taken by each message larger than most, until it is answered
	decoding chan struct{} // one is taken while a message is decoded

	mu    sync.Mutex // guards what is below
	conns map[net.Conn]*connState
}

// A connState tells a connection that a call is being answered on from one
// that only takes up room.
type connState struct {
	idle    time.Time
	working bool
}

func newHandler(methods []method) *handler {
	h := &handler{
		methods:  make(map[string]method),
		refused:  logLimit{burst: 20, perSecond: 0.2},
		large:    make(chan struct{}, largeAtOnce),
		decoding: make(chan struct{}, decodeAtOnce),
		conns:    make(map[net.Conn]*connState),
	}
	for _, m := range append(methods, h.introspection()...) {
		h.methods[m.name] = m
	}
	return h
}

type connKey struct{}

// server returns an HTTP server with limits on all that a peer can send. Of
// more than 64 connections the one that has been without a call for longest is
// closed, so that nobody keeps the monitor out by holding many.
func (h *handler) server() *http.Server {
	return &http.Server{
		Handler:                      h,
		ReadTimeout:                  readTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeader - 4096, // net/http reads 4096 more
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     log.New(&h.refused, "", 0), // mostly what peers do wrong
		ConnContext:                  func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
		ConnState:                    h.connChanged,
	}
}

func (h *handler) connChanged(c net.Conn, state http.ConnState) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch state {
	case http.StateNew:
		h.conns[c] = &connState{idle: time.Now()}
		if len(h.conns) > maxConns {
			if oldest := h.oldestIdle(); oldest != nil {
				delete(h.conns, oldest)
				go oldest.Close() // over TLS it may take a while
			}
		}
	case http.StateIdle:
		if s := h.conns[c]; s != nil {
			s.idle = time.Now()
		}
	case http.StateClosed, http.StateHijacked:
		delete(h.conns, c)
	}
}

func (h *handler) oldestIdle() (oldest net.Conn) {
	for c, s := range h.conns {
		if !s.working && (oldest == nil || s.idle.Before(h.conns[oldest].idle)) {
			oldest = c
		}
	}
	return oldest
}

// working notes whether a call is being answered on the request's connection.
func (h *handler) working(r *http.Request, working bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c, _ := r.Context().Value(connKey{}).(net.Conn)
	if s := h.conns[c]; s != nil {
		s.working, s.idle = working, time.Now()
	}
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer h.working(r, false)
	status, answer := h.answer(w, r)
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	if status != http.StatusOK {
		h.refused.printf("%s: %s %s: HTTP %d", r.RemoteAddr, cut(r.Method), cut(r.URL.Path), status)
		http.Error(w, http.StatusText(status), status)
		return
	}
	w.Header().Set("Content-Type", "text/xml")
	w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	w.Write(answer) // a peer that has gone does not want it
}

// answer returns the HTTP status and, with 200, the methodResponse.
func (h *handler) answer(w http.ResponseWriter, r *http.Request) (status int, answer []byte) {
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
	h.working(r, true)
	h.decoding <- struct{}{}
	name, params, err := decodeCall(message)
	<-h.decoding
	if err != nil {
		h.refused.printf("%s: %v", r.RemoteAddr, err)
		return http.StatusOK, encodeResponse(nil, err)
	}
	return http.StatusOK, encodeResponse(h.call(request{r.RemoteAddr, time.Now()}, name, params))
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
	select {
	case h.large <- struct{}{}:
	case <-time.After(readTimeout):
		return nil, done, errors.New("too many large messages at once")
	}
	done = func() { <-h.large }
	rest, err := io.ReadAll(body)
	return append(message, rest...), done, err
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
			h.refused.printf("%s: %s: %v", r.peer, cut(name), err)
		case err != nil:
			log.Printf("%s: %s: defect: %v", r.peer, cut(name), err)
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
	results := []any{}
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
		if err != nil {
			results = append(results, faultStruct(err))
		} else {
			results = append(results, []any{v})
		}
	}
	return results, nil
}

// A client calls the XML-RPC methods of one URL.
type client struct {
	url  *url.URL
	http http.Client
}

// newClient returns a client whose calls take at most the timeout, each as a
// whole. It follows no redirect and asks no proxy: what it sends goes to that
// URL or nowhere.
func newClient(u *url.URL, timeout time.Duration) *client {
	return &client{url: u, http: http.Client{
		Timeout:       timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext:            (&net.Dialer{Timeout: timeout}).DialContext, // else a dial outlives its call by minutes
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
			IdleConnTimeout:        200 * time.Millisecond, // between two readings of a burst; a monitor that serves one connection waits for its end
			MaxResponseHeaderBytes: maxHeader,
			DisableCompression:     true,
		},
	}}
}

// close closes the connections that wait for another call.
func (c *client) close() { c.http.CloseIdleConnections() }

// call calls a method and returns its result. The error is a *fault exactly
// when the peer answered with one.
func (c *client) call(ctx context.Context, name string, params ...any) (any, error) {
	resp, err := c.post(ctx, &c.http, name, params)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return readResponse(resp.Body)
}

// post sends a call and returns an answer with HTTP status 200.
func (c *client) post(ctx context.Context, over *http.Client, name string, params []any) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url.String(), bytes.NewReader(encodeCall(name, params...)))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "text/xml")
	r.Header.Set("User-Agent", "picket")
	// Not sent, but it lets net/http repeat the call on a fresh connection
	// where a kept one turns out to have been closed.
	r.Header["Idempotency-Key"] = nil
	resp, err := over.Do(r)
	if err != nil {
		var bare *url.Error
		if errors.As(err, &bare) {
			err = bare.Err // without the URL, which the caller names
		}
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		resp.Body.Close()
		return nil, fmt.Errorf("HTTP %s", cut(resp.Status))
	}
	return resp, nil
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
	ctx, stop := context.WithTimeout(ctx, fetchTime)
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	patience := c.http.Timeout
	timer := time.AfterFunc(patience, func() { cancel(fmt.Errorf("nothing has come for %v", patience)) })
	defer timer.Stop()
	buffered := bufio.NewWriterSize(to, 32<<10)
	patient := http.Client{Transport: c.http.Transport, CheckRedirect: c.http.CheckRedirect}
	resp, err := c.post(ctx, &patient, name, params)
	if err == nil {
		defer resp.Body.Close()
		err = readBase64Response(&movingReader{resp.Body, 2*limit + maxMessage, func() { timer.Reset(patience) }}, buffered)
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
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
	maxKept     = 1024            // readings kept for a monitor that is away
	maxBackoff  = 5 * time.Minute // between two attempts to reach it
	maxTries    = 3               // of a reading that the monitor answers with a fault
	faultFactor = 10              // a fault waits so much longer than a monitor that is away: a locked database takes its time
	lastTime    = time.Second     // for an attempt when the agent ends
	lastMisses  = 4               // after so many then, one after the other, the monitor counts as away
	roomForRuns = 64              // readings of those that run when no more may begin
)

// A reading is what one run of a sensor came to.
type reading struct {
	code   int       // 0, or why there is no number
	value  string    // the sensor's own digits; "" where there is no number
	taken  time.Time // with the monotonic clock's reading
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
	last      bool // its attempt when the agent ends has begun
	discarded bool // not to be kept if this attempt fails
}

// A delivery hands readings in at the monitor with cmd_store_probe_data, the
// oldest first and one at a time: old monitors serve one connection, and the
// next one only when that is closed. A reading leaves the delivery when the
// monitor has taken it, has answered three times with a fault or has given
// its ticket away again, and when 1,024 newer ones wait.
type delivery struct {
	zone    *time.Location // of the times that are sent
	noValue string         // sent where there is no number
	clock   func() time.Time
	retry   time.Duration // before the second attempt; doubled from then on, up to 5 minutes
	cancel  context.CancelFunc
	done    chan struct{} // closed when nothing is sent any more
	dropped logLimit

	mu      sync.Mutex // guards what is below
	client  *client
	changed *sync.Cond
	kept    []*undelivered // oldest first
	away    time.Time      // since when the monitor has been away; zero when it is not
	missed  int            // attempts since then
	probeAt time.Time      // the next one
	last    bool           // what comes now is the last, and not limited
	closing bool
	abort   context.CancelFunc // of the attempt under way
}

// newDelivery returns a delivery that is at work until close.
func newDelivery(c *client, zone *time.Location, noValue string, retry time.Duration) *delivery {
	ctx, cancel := context.WithCancel(context.Background())
	d := &delivery{
		client: c, zone: zone, noValue: noValue, clock: time.Now, retry: retry, cancel: cancel,
		done: make(chan struct{}), dropped: logLimit{burst: 20, perSecond: 0.2},
	}
	d.changed = sync.NewCond(&d.mu)
	go func() {
		defer close(d.done)
		for u, c := d.next(); u != nil; u, c = d.next() {
			d.settle(u, c, d.attempt(ctx, u, c))
		}
	}()
	return d
}

// put takes a reading to deliver. It never blocks.
func (d *delivery) put(ticket any, r reading) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.kept) >= maxKept && !d.last {
		oldest := d.kept[0]
		if oldest.sending {
			oldest = d.kept[1]
		}
		d.remove(oldest)
		d.dropped.printf("%s: reading dropped: the oldest of more than %d undelivered", ticketText(oldest.ticket), maxKept)
	}
	d.kept = append(d.kept, &undelivered{reading: r, ticket: ticket})
	d.changed.Broadcast()
}

// putLast lets more than 1,024 readings in from now on: when the agent ends,
// those of the commands that waited must not push out what was measured.
func (d *delivery) putLast() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = true
}

// waitRoom waits while the monitor is there, but slower than the sensors: then
// it is the dispatcher that has to wait, and nothing is dropped.
func (d *delivery) waitRoom(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() {
		d.mu.Lock() // not before Wait waits
		defer d.mu.Unlock()
		d.changed.Broadcast()
	})
	defer stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.kept) >= maxKept-roomForRuns && d.away.IsZero() && !d.closing && ctx.Err() == nil {
		d.changed.Wait()
	}
}

// discard forgets an undelivered reading: the monitor has given its ticket
// away again.
func (d *delivery) discard(ticket any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, u := range slices.Clone(d.kept) {
		if u.ticket != ticket || u.discarded {
			continue
		}
		if u.discarded = true; !u.sending {
			d.remove(u)
		}
		d.dropped.printf("%s: reading discarded: the ticket was given away again", ticketText(ticket))
	}
}

func (d *delivery) remove(u *undelivered) {
	if i := slices.Index(d.kept, u); i >= 0 {
		d.kept = slices.Delete(d.kept, i, i+1)
	}
}

// monitor is the client of the monitor that readings go to.
func (d *delivery) monitor() *client {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.client
}

// moveTo has readings go to another monitor from now on, those that are kept
// too, and at once.
func (d *delivery) moveTo(c *client) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.client.close()
	d.client = c
	d.away, d.missed = time.Time{}, 0
	for _, u := range d.kept {
		u.missed, u.faults, u.notBefore = 0, 0, time.Time{}
	}
	d.changed.Broadcast()
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
		case at.IsZero():
			d.changed.Wait()
		default:
			timer := time.AfterFunc(time.Until(at), func() {
				d.mu.Lock() // not before Wait waits
				defer d.mu.Unlock()
				d.changed.Broadcast()
			})
			d.changed.Wait()
			timer.Stop()
		}
	}
}

// pick chooses the reading to send now, or says when there may be one (zero:
// nobody knows). It is the oldest. While the monitor is away, or the agent
// ends, every second attempt is made with the newest, and no reading is tried
// much more often than others: one that the monitor always chokes on must not
// hold up the rest.
func (d *delivery) pick(now time.Time) (best *undelivered, at time.Time) {
	away := !d.away.IsZero()
	if away && now.Before(d.probeAt) {
		return nil, d.probeAt
	}
	for _, u := range d.kept {
		switch {
		case now.Before(u.notBefore):
			if at.IsZero() || u.notBefore.Before(at) {
				at = u.notBefore
			}
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
	d.mu.Unlock()
	if u.last {
		defer time.AfterFunc(lastTime, cancel).Stop()
	}
	return d.store(ctx, u, c)
}

// store makes one attempt. The time that it sends is now less the reading's
// age by the monotonic clock: right also where the clock was set after the
// reading was taken, as on a box that boots in 1970.
func (d *delivery) store(ctx context.Context, u *undelivered, c *client) error {
	value := u.value
	if value == "" {
		value = d.noValue
	}
	taken := d.clock().Add(-time.Since(u.taken)).In(d.zone)
	_, err := c.call(ctx, "cmd_store_probe_data", u.ticket, []any{u.code, value}, dateTime(taken.Format(dateTimeLayout)))
	return err
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
		d.remove(u)
		d.reached(now)
	case c != d.client: // which is no longer the monitor
	case errors.As(err, &f):
		d.reached(now)
		u.faults++
		u.notBefore = now.Add(backoff(d.retry*faultFactor, u.faults))
		if u.faults == maxTries {
			d.remove(u)
			d.dropped.printf("%s: reading dropped: monitor %s: %v", ticketText(u.ticket), d.client.url.Redacted(), err)
		}
	default:
		if d.away.IsZero() {
			d.away = now
			log.Printf("monitor %s: away: %v", d.client.url.Redacted(), err)
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
}

// reached notes that the monitor has answered.
func (d *delivery) reached(now time.Time) {
	if !d.away.IsZero() {
		log.Printf("monitor %s: back after %s, %s more to deliver", d.client.url.Redacted(), now.Sub(d.away).Round(time.Second), plural(len(d.kept), "reading"))
	}
	d.away, d.missed = time.Time{}, 0
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
// monitor allow, and then sends nothing any more.
func (d *delivery) close(ctx context.Context) {
	d.mu.Lock()
	d.closing = true
	d.probeAt, d.missed = time.Time{}, 0
	for _, u := range d.kept {
		u.notBefore = time.Time{}
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
	defer d.mu.Unlock()
	if n := len(d.kept); n > 0 {
		log.Printf("monitor %s: %s not delivered", d.client.url.Redacted(), plural(n, "reading"))
	}
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

func zoneOf(tz string, ok bool, etc string) *time.Location {
	if !ok {
		if data, err := os.ReadFile(filepath.Join(etc, "localtime")); err == nil {
			if zone, err := time.LoadLocationFromTZData("Local", data); err == nil {
				return zone
			}
		}
		text, err := os.ReadFile(filepath.Join(etc, "TZ"))
		if err != nil {
			return time.UTC
		}
		tz = strings.TrimSpace(string(text))
	}
	tz = strings.TrimPrefix(tz, ":")
	if data, err := os.ReadFile(tz); err == nil && strings.HasPrefix(tz, "/") {
		if zone, err := time.LoadLocationFromTZData("Local", data); err == nil {
			return zone
		}
	}
	if zone, err := time.LoadLocation(tz); err == nil {
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
		log.Printf("%s left out", plural(l.left, "line"))
		l.left = 0
	}
	log.Printf(format, args...)
}

// Write logs a line of somebody else's log.
func (l *logLimit) Write(p []byte) (int, error) {
	l.printf("%s", oneLine(strings.TrimSpace(string(p))))
	return len(p), nil
}
