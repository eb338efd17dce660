# The small static binary: no C, no paths of this machine, no symbols, no HTTP/2.
build:
	CGO_ENABLED=0 go build -trimpath -tags nethttpomithttp2 -ldflags '-s -w' -o picket .

test:
	go test ./...

check:
	.ci/run

clean:
	rm -f picket

.PHONY: build test check clean
