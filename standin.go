package main

// Stand-ins for what other parts bring; this file goes when they are merged.

import (
	"fmt"
	"os"
)

// openRegular opens a file for reading, and no pipe or directory.
func openRegular(file string) (*os.File, error) {
	info, err := os.Stat(file)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: not a regular file", file)
	}
	if err != nil {
		return nil, err
	}
	return os.Open(file)
}
