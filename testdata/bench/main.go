// The yardstick of picket's benchmarks: a program with the agent's imports and as
// little else as possible.
//
//	listen          serves HTTP and answers every request with OK
//	serve SENSOR    so, and each request makes it run the sensor, two at once
//	loop SENSOR N   runs the sensor N times, two at once
//	send URL N BODY posts the body N times over one connection
package main

import (
	"archive/tar"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/xml"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"log"
	"log/syslog"
	"math/rand"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	switch os.Args[1] {
	case "listen":
		serve(func() {})
	case "serve":
		work := make(chan bool, 256)
		for i := 0; i < 2; i++ {
			go func() {
				for range work {
					run()
				}
			}()
		}
		serve(func() { work <- true })
	case "loop":
		loop()
	case "send":
		send()
	default:
		unused()
	}
}

func run() {
	if out, err := exec.Command(os.Args[2]).Output(); err != nil || string(out) != "42\n" {
		panic(err)
	}
}

func serve(before func()) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Fprintln(os.Stderr, "on", l.Addr().String()+",")
	panic((&http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		before()
		io.WriteString(w, "OK")
	})}).Serve(l))
}

func loop() {
	n, _ := strconv.Atoi(os.Args[3])
	var both sync.WaitGroup
	for i := 0; i < 2; i++ {
		both.Add(1)
		go func() {
			defer both.Done()
			for i := 0; i < n/2; i++ {
				run()
			}
		}()
	}
	both.Wait()
}

func send() {
	n, _ := strconv.Atoi(os.Args[3])
	for i := 0; i < n; i++ {
		resp, err := http.Post(os.Args[2], "text/xml", strings.NewReader(os.Args[4]))
		if err != nil {
			panic(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
}

// unused links what the agent imports beside net/http's server and os/exec.
func unused() {
	resp, err := http.Get(os.Args[1])
	if err != nil {
		panic(err)
	}
	z, err := gzip.NewReader(resp.Body)
	h, err2 := tar.NewReader(bzip2.NewReader(z)).Next()
	var v struct{ A string }
	fmt.Println(h, err, err2, xml.NewDecoder(resp.Body).Decode(&v))
	http.ServeTLS(nil, nil, "", "")
	w, err := syslog.New(syslog.LOG_DAEMON, "")
	fmt.Println(w, err)
	fmt.Println(user.Lookup(os.Args[1]))
	flag.Parse()
	signal.Notify(make(chan os.Signal), syscall.SIGHUP)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	pair, err := tls.X509KeyPair(nil, nil)
	fmt.Println(ctx, pair, err, x509.NewCertPool().AppendCertsFromPEM(nil))
	u, err := url.Parse(os.Args[1])
	fmt.Println(u, err, netip.MustParsePrefix(os.Args[1]), filepath.Clean(os.Args[1]))
	key := base64.StdEncoding.EncodeToString([]byte(os.Args[1]))
	fmt.Println(ed25519.Verify([]byte(key), nil, nil), hex.EncodeToString([]byte(key)), crc32.ChecksumIEEE([]byte(key)))
	log.Print(rand.Int(), slices.Index(os.Args, ""), bytes.ToLower([]byte(key)), debug.SetGCPercent(1))
}
