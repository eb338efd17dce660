# When the source was made, for a box whose clock is behind that.
BUILT ?= $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct 2>/dev/null || date +%s))

# The small static binary: no C, no paths of this machine, no symbols, no HTTP/2.
build:
	CGO_ENABLED=0 go build -trimpath -tags nethttpomithttp2 -ldflags '-s -w -X main.built=$(BUILT)' -o picket .

test:
	go test ./...

check:
	.ci/run

clean:
	rm -f picket

.PHONY: build test check clean
