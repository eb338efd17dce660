# When the source was made, for a box whose clock is behind that; and its name.
BUILT ?= $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct 2>/dev/null || date +%s))
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

# The small static binary: no C, no paths of this machine, no symbols, no HTTP/2.
flags = -trimpath -buildvcs=false -tags nethttpomithttp2 -ldflags '-s -w -buildid= -X main.built=$(BUILT) -X main.release=$(1)'
FLAGS = $(call flags,$(VERSION))
COMMITTED = $(call flags,$(VERSION:%-dirty=%))

build:
	CGO_ENABLED=0 go build $(FLAGS) -o picket .

test:
	go test ./...

check:
	.ci/run

bench:
	go test -run '^$$' -bench '^BenchmarkBudgets$$' -benchtime 1x -timeout 30m .

# What each kind of box needs of the toolchain.
amd64          = GOARCH=amd64
386            = GOARCH=386
386-softfloat  = GOARCH=386 GO386=softfloat
armv5          = GOARCH=arm GOARM=5
armv6          = GOARCH=arm GOARM=6
armv7          = GOARCH=arm GOARM=7
arm64          = GOARCH=arm64
mips           = GOARCH=mips GOMIPS=softfloat
mipsle         = GOARCH=mipsle GOMIPS=softfloat
mips64         = GOARCH=mips64 GOMIPS64=softfloat
mips64le       = GOARCH=mips64le GOMIPS64=softfloat
riscv64        = GOARCH=riscv64
ppc64le        = GOARCH=ppc64le
s390x          = GOARCH=s390x
ALL    = amd64 386 386-softfloat armv5 armv6 armv7 arm64 mips mipsle mips64 mips64le riscv64 ppc64le s390x
BOXES ?= $(ALL)
DIST ?= dist

# A tar.gz for each kind of box, which unpacks into one folder ready to copy, and
# that folder itself. They hold what git has committed, never a changed client.cfg
# or a sensor of one's own. The same source gives the same bytes.
dist: $(BOXES:%=$(DIST)/picket-linux-%.tar.gz)
	rm -rf $(DIST)/source
	cd $(DIST) && sha256sum $(BOXES:%=picket-linux-%.tar.gz) >SHA256SUMS

$(DIST)/source: always
	@git rev-parse --verify -q HEAD >/dev/null || { echo "make dist packs what git has committed: this is no git checkout" >&2; exit 1; }
	@git status --porcelain | sed 's/^/make dist leaves out what is not committed: /' >&2
	rm -rf $@ && mkdir -p $@
	git archive HEAD | tar -xf - -C $@

$(DIST)/picket-linux-%.tar.gz: $(DIST)/source
	rm -rf $(DIST)/$* && mkdir -p $(DIST)/$*/picket
	cd $(DIST)/source && CGO_ENABLED=0 GOOS=linux $(or $($*),$(error no box "$*": make dist knows $(ALL))) go build $(COMMITTED) -o $(abspath $(DIST))/$*/picket/picket .
	cd $(DIST)/source && cp -r client.cfg sensors contrib docs README.md $(abspath $(DIST))/$*/picket
	tar -C $(DIST)/$* --sort=name --mtime=@$(BUILT) --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX -cf - picket | gzip -9n >$@

# For kernels from 2.6.32 on, which Go 1.24 and later do not run on.
dist-old:
	GOTOOLCHAIN=go1.23.12 $(MAKE) dist DIST=dist-old

clean:
	rm -rf picket dist dist-old

always:

.PHONY: build test check bench dist dist-old clean always
