// The yardstick of picket's benchmarks: a program with the imports that the agent
// cannot do without, and as little else as possible.
//
//	listen          serves HTTP and answers every request with OK
//	serve SENSOR    so, and each request makes it run the sensor, two at once
//	loop SENSOR N   runs the sensor N times, two at once, and prints the
//	                processor time that this took, in nanoseconds
//	send URL N BODY posts the body N times over one connection
package main

import (
	"archive/tar"
	"compress/bzip2"
	"encoding/xml"
	"fmt"
	"io"
	"log/syslog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"syscall"
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
	var self, children syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &self)
	syscall.Getrusage(syscall.RUSAGE_CHILDREN, &children)
	fmt.Println(self.Utime.Nano() + self.Stime.Nano() + children.Utime.Nano() + children.Stime.Nano())
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

// unused links what the agent uses beside net/http's server and os/exec.
func unused() {
	resp, err := http.Get(os.Args[1])
	if err != nil {
		panic(err)
	}
	h, err := tar.NewReader(bzip2.NewReader(resp.Body)).Next()
	var v struct{ A string }
	fmt.Println(h, err, xml.NewDecoder(resp.Body).Decode(&v))
	http.ServeTLS(nil, nil, "", "")
	w, err := syslog.New(syslog.LOG_DAEMON, "")
	fmt.Println(w, err)
	fmt.Println(user.Lookup(os.Args[1]))
}
