package main

// Stand-ins for what other parts bring; this file goes when they are merged.

import (
	"fmt"
	"os"
)

// retire returns a channel that is closed when the runs of a sensor that are
// under way now have ended.
func (s *sensors) retire(name string) <-chan struct{} {
	ended := make(chan struct{})
	u, done := s.use(name)
	go func() {
		u.Lock()
		u.Unlock()
		done()
		close(ended)
	}()
	return ended
}

// openRegular opens a file for reading, and no pipe or directory.
func openRegular(file string) (*os.File, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a file", file)
	}
	return os.Open(file)
}
