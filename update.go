package main

// The commands that change the agent itself: new code for a sensor, the way back from it, and the
// move to another monitor.
//
// A package is SENSOR.tar.bz2 (gzip and plain tar are taken, too) with one directory at the top, the
// sensor's name, and nothing else but what git archive and macOS add:
//
//	disk/                disk/check alone is enough
//	disk/check
//	disk/version         1.4.2: no older version replaces this one
//
// Its signature, SENSOR.tar.bz2.sig, is what OpenBSD's signify and OpenWrt's usign write, and so are
// the public keys:
//
//	untrusted comment: verify with fleet.pub
//	RWQ...               base64 of "Ed", 8 bytes of key number, 64 bytes of signature or 32 of key
//
// A change makes these names one after the other. They tell recover how far it had come when the
// power went:
//
//	sensors/.picket-staging-dlk3...           the package, unpacked and tried here
//	sensors_backup/.picket-backup-disk        the installed version, being linked or copied
//	sensors/.picket-swap-disk                 the installed version, out of the way; the backup is complete
//	sensors/disk                              the new version: this rename decides
//	sensors_backup/disk_2010-03-07T21:24:33   the installed version, a backup from here on
//	sensors/.picket-gone-disk                 the installed version, for the runs that are still in it
//
// The last one stays until the next change of the sensor or the next start. If the new version is not in
// its place, recover puts the installed one back, else it does what is left to do. It removes every other
// hidden name. It treats what older versions of picket left in the same way: .picket-lock,
// .picket-new-disk, .picket-next-disk and .picket-old-disk.
//
// Root may change sensors in a directory of another user, who can put links in the way at any moment.
// So everything is done in open directories, and no link is followed (see dir).

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	maxEntries   = 1024        // files and directories in a package
	maxPath      = 255         // bytes of an entry's name
	maxNesting   = 200         // directories above a file: maxPath allows for 128 in a package
	maxKeyFile   = 4 << 10     // bytes of a public key or signature: they have about 150
	maxVersion   = 256         // bytes that are read of a file named version
	spaceReserve = 256 << 10   // bytes of a file system that an update leaves free
	dirSpace     = 4 << 10     // bytes that a directory is taken to need
	lockTime     = time.Minute // to wait for another process that changes sensors

	hidden        = ".picket-"               // begins all names that picket makes for itself
	stagingPrefix = ".picket-staging-"       // the package, unpacked
	gonePrefix    = ".picket-gone-"          // the version that was replaced: runs may be in it
	backupPrefix  = ".picket-backup-"        // a backup that is being made
	olderPrefix   = ".picket-new-"           // older pickets: the new version of a sensor
	nextPrefix    = ".picket-next-"          // the same, in pickets after those
	oldPrefix     = ".picket-old-"           // older pickets: the replaced version, not yet a backup
	olderBackups  = ".*_????-??-??T??:??:??" // older pickets: a backup half made or half removed
	backupLayout  = "2006-01-02T15:04:05"
)

// An updater replaces sensors by packages, and by their backups.
//
// Whatever fails, power included, the old version or the new one is complete on the disk at every moment.
// After recover it is in its place, and nothing else is left. After a change only the version that it
// replaced is left, for runs that are under way.
type updater struct {
	sensors     *sensors
	backup      string // the directory of backups
	keys        string // a public key, or a directory of them; "" takes unsigned packages
	maxPackage  int64  // bytes
	maxUnpacked int64  // bytes
	keep        int    // backups of a sensor; 0 keeps all

	step func(what string) error // for tests: it is called before each change of the file system
}

// A source writes a package or, if the suffix is ".sig", its signature.
type source func(ctx context.Context, suffix string, to io.Writer) error

// fromMonitor returns the source of the package that the monitor has for a sensor, of at most limit bytes.
func fromMonitor(c *client, name string, limit int64) source {
	return func(ctx context.Context, suffix string, to io.Writer) error {
		if suffix == "" {
			return c.fetch(ctx, to, limit, "cmd_get_sensor_code", name)
		}
		v, err := c.call(ctx, "cmd_get_sensor_signature", name)
		if err != nil {
			return err
		}
		switch v.(type) {
		case string, []byte:
			_, err = fmt.Fprintf(to, "%s", v)
			return err
		}
		return fmt.Errorf("got %s; want base64 or string", typeName(v))
	}
}

// fromFile returns the source of a package that lies on the box, its signature beside it.
func fromFile(file string) source {
	return func(_ context.Context, suffix string, to io.Writer) error {
		f, err := openRegular(file + suffix)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(to, f)
		return err
	}
}

// install fetches a package, verifies it, unpacks it, tries it and puts it in the place of the
// sensor. The installed version becomes a backup. An error means that nothing has changed.
func (u *updater) install(ctx context.Context, name string, from source) error {
	c := &change{updater: u, ctx: ctx, name: name, from: from}
	return c.make(c.fetch, c.verify, c.unpack, c.checkVersion, c.try, c.replace)
}

// rollback puts the newest backup of a sensor in its place and removes it from the backups. The
// installed version becomes a backup. An error means that nothing has changed.
func (u *updater) rollback(ctx context.Context, name string) error {
	c, newest := &change{updater: u, ctx: ctx, name: name}, ""
	return c.make(func() error {
		backups, err := c.backupsOf(name)
		if err == nil && len(backups) == 0 {
			err = errors.New("there is no backup")
		}
		if err != nil {
			return err
		}
		newest = backups[len(backups)-1]
		return c.copy(c.backups, newest, c.staging, name)
	}, c.replace, func() error {
		c.tidy(c.backups.rename(newest, c.backups, gonePrefix+name)) // settle removes it
		return nil
	})
}

// recover finishes or undoes what a power cut interrupted, and removes what is left. It may itself be
// interrupted and called again. It does not wait for the lock: the process that holds it has recovered
// already. If nothing was interrupted, it writes nothing.
func (u *updater) recover(ctx context.Context) error {
	left, _ := fs.Glob(os.DirFS(u.sensors.path), hidden+"*")
	if !exists(u.sensors.path) || len(left) == 0 && !exists(u.backup) {
		return nil
	}
	c := &change{updater: u, ctx: ctx}
	defer c.close()
	err := c.begin(0)
	if errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	for i := 0; i < 2 && err == nil; i++ { // the second settle removes the versions that the first one moved
		err = c.settle()
	}
	return err
}

// ownerWarning returns a line for the log, or "". It warns root if the sensors belong to another user and
// the backups to root: so it is after tar has kept the user number of whoever packed the sensors.
func (u *updater) ownerWarning() string {
	sensors, err := os.Stat(u.sensors.path)
	backups, err2 := os.Stat(u.backup)
	if err != nil || err2 != nil || os.Geteuid() != 0 || ownerOf(sensors).Uid == 0 || ownerOf(backups).Uid != 0 {
		return ""
	}
	return fmt.Sprintf("%s belongs to user %d, who can change what the agent runs: "+
		"give it to root with chown -R 0:0 %s", u.sensors.path, ownerOf(sensors).Uid, u.sensors.path)
}

// A change is the state of one change of a sensor, or of recovery. Its directories are open and locked.
type change struct {
	*updater
	ctx       context.Context
	name      string // of the sensor; "" in recovery
	from      source
	installed dir             // the sensors
	owner     *syscall.Stat_t // of that directory
	backups   dir
	staging   dir
	archive   *os.File // the package
	entries   int      // files and directories that were unpacked
}

// make runs the steps of a change, up to the first one that fails, while no other process changes
// sensors. Before the first step it settles what earlier changes left. After the last one it removes
// what is left of this change, except the version that was replaced.
func (c *change) make(steps ...func() error) error {
	defer c.close()
	if err := c.begin(lockTime); err != nil {
		return err
	}
	err := c.settle()
	if err != nil && (c.installed.has(swapPrefix+c.name) || c.installed.has(oldPrefix+c.name)) {
		return fmt.Errorf("an earlier change is not settled: %w", err)
	}
	c.tidy(err)
	c.tidy(c.installed.remove(gonePrefix + c.name))
	c.staging, err = c.installed.mkdir(stagingPrefix+strconv.FormatInt(time.Now().UnixNano(), 36), 0o711)
	for i := 0; err == nil && i < len(steps); i++ {
		err = steps[i]()
	}
	c.tidy(c.settle())
	if err == nil {
		c.tidy(c.prune())
	}
	return err
}

// tidy logs an error that does not decide whether the change was made. recover tries again what failed.
func (c *change) tidy(err error) {
	if err != nil {
		log.Printf(warning+"tidy sensors: %v", err)
	}
}

// begin opens the directories of sensors and of backups, and makes them if they are missing. It locks
// the backups: no other user can hold that lock, as none can read them. If another process that changes
// sensors holds it for longer than wait, the error wraps context.DeadlineExceeded.
func (c *change) begin(wait time.Duration) (err error) {
	if c.installed, err = c.openBase(c.sensors.path, 0o755); err != nil {
		return err
	}
	isNew := !exists(c.backup)
	if c.backups, err = c.openBase(c.backup, 0o700); err != nil {
		return err
	}
	sensors, err := c.installed.Stat()
	backups, err2 := c.backups.Stat()
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	if os.SameFile(sensors, backups) {
		return fmt.Errorf("%s and %s are the same directory", c.sensors.path, c.backup)
	}
	c.owner = ownerOf(sensors)
	if isNew {
		c.tidy(chown(c.backups.File, c.owner))
	} else if c.name != "" {
		c.backups.Chmod(0o700) // older versions made it open; only its owner can close it
	}
	if err := flockWithin(c.ctx, c.backups.File, wait); err != nil {
		return fmt.Errorf("lock %s: another process is changing the sensors: %w", c.backup, err)
	}
	return nil
}

// close closes what is open of the directories and the package, and so unlocks the backups.
func (c *change) close() {
	for _, f := range []*os.File{c.installed.File, c.backups.File, c.staging.File, c.archive} {
		f.Close()
	}
}

// openBase opens the directory of sensors or of backups. If it is missing, openBase makes it with this
// mode, whatever the umask, and the directories above it with mode 755. Root follows no link in its place
// that another user could have made, but trusts the path to it, which is client.cfg's.
func (c *change) openBase(path string, mode fs.FileMode) (dir, error) {
	flags := syscall.O_DIRECTORY
	if info, err := os.Stat(filepath.Dir(path)); err == nil && os.Geteuid() == 0 &&
		(ownerOf(info).Uid != 0 || info.Mode().Perm()&0o022 != 0) {
		flags |= syscall.O_NOFOLLOW
	}
	f, err := os.OpenFile(path, flags, 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return dir{File: f, step: c.step}, err
	}
	parent, err := c.openBase(filepath.Dir(path), 0o755)
	if err != nil {
		return dir{}, err
	}
	defer parent.Close()
	return parent.mkdir(filepath.Base(path), mode)
}

// ownerOf returns the system's record of a file, for the user and the group that it belongs to.
func ownerOf(info fs.FileInfo) *syscall.Stat_t { return info.Sys().(*syscall.Stat_t) }

// chown gives an open file to an owner, unless that is nil. Only root can do so; others own what they make.
func chown(f *os.File, owner *syscall.Stat_t) error {
	if owner == nil || os.Geteuid() != 0 {
		return nil
	}
	return f.Chown(int(owner.Uid), int(owner.Gid))
}

// try runs the staged version with the help argument. It must exit 0 within the sensor's time-out. Then
// try gives all that is there to the owner of the sensors.
func (c *change) try() error {
	s, dir := c.sensors.of(c.name), c.staging.path(c.name)
	switch o := s.runIn(c.ctx, dir, stagingPrefix+c.name, []string{s.help}, nil); o.code {
	case 0:
		return c.give(c.staging, c.name)
	case codeNotFound:
		return fmt.Errorf("it holds no executable %s", s.executable)
	default:
		return fmt.Errorf("try %s %s: %s", s.executable, s.help, o)
	}
}

// give gives a file, or a directory with all that is in it, to the owner of the directory of sensors, so
// that an agent that runs as him can replace it, and syncs it. It works from the inside out, so that it
// touches nothing any more that the owner can already exchange. A trial may have made links, sockets and
// files that cannot be read; they stay as they are.
func (c *change) give(in dir, name string) error {
	f, err := in.open(name, 0)
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENXIO) || errors.Is(err, fs.ErrPermission) {
		return nil
	} else if err != nil {
		return err
	}
	defer f.Close()
	var names []string
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		names, err = f.names()
	}
	for _, name := range names {
		err = errors.Join(err, c.give(f, name))
	}
	return errors.Join(err, chown(f.File, c.owner), syncFile(f.File))
}

// replace puts the staged version in the place of the sensor, and the installed one out of the way. For an
// instant there is no sensor, and new runs wait. settle makes a backup of the installed version or, after an
// error, puts it back.
func (c *change) replace() error {
	if c.installed.has(c.name) {
		err := c.copy(c.installed, c.name, c.backups, backupPrefix+c.name)
		if err = errors.Join(err, syncFile(c.backups.File)); err == nil {
			err = c.installed.rename(c.name, c.installed, swapPrefix+c.name)
		}
		if errors.Is(err, syscall.EXDEV) { // a directory in the lower layer of an overlay file system
			err = c.moveLower()
		}
		if err != nil {
			return err
		}
	}
	err := c.staging.do("rename", c.name, func(path string) error { return os.Rename(path, c.installed.at(c.name)) })
	if err == nil {
		c.tidy(syncFile(c.installed.File)) // whatever comes of that, all can see the new version in its place
	}
	return err
}

// moveLower moves the installed version out of the way if it cannot be renamed: it copies and removes it.
func (c *change) moveLower() error {
	err := c.copy(c.installed, c.name, c.staging, swapPrefix)
	if err == nil {
		err = c.staging.rename(swapPrefix, c.installed, swapPrefix+c.name)
	}
	if err != nil {
		return err
	}
	if d, err := c.installed.open(c.name, syscall.O_DIRECTORY); err == nil {
		os.Remove(d.at(c.sensors.executable)) // first, so that nobody takes half a sensor for one
		d.Close()
	}
	return c.installed.remove(c.name)
}

// settle finishes or undoes what changes left, and removes what nobody needs. Versions that were replaced
// stay, unless this is recovery. If settle fails for one sensor, it goes on with the next.
func (c *change) settle() error {
	files, err := c.installed.names()
	errs := []error{err}
	for _, file := range files { // in order: an older picket's new version of a sensor comes before the old one
		prefix, name := versionOf(file)
		isWhole, err := true, error(nil)
		if prefix != "" {
			isWhole, err = c.isWhole(name)
		}
		switch {
		case err != nil: // the disk does not tell, and whatever is done may be wrong
			errs = append(errs, fmt.Errorf("sensor %s: %w", name, err))
		case prefix == olderPrefix && c.installed.has(oldPrefix+name), !isWhole:
			// If the remove fails, so does the rename: a directory that is not empty is in the way.
			errs = append(errs, c.installed.remove(name), c.installed.rename(file, c.installed, name))
		case prefix == swapPrefix || prefix == oldPrefix:
			errs = append(errs, c.keepOld(file, name))
		case strings.HasPrefix(file, hidden) && (c.name == "" || !strings.HasPrefix(file, gonePrefix)):
			errs = append(errs, c.installed.remove(file))
		}
	}
	backups, err := c.backups.names()
	errs = append(errs, err)
	for _, backup := range backups { // half made or half removed, unless its change is not settled
		isOlder, _ := path.Match(olderBackups, backup)
		name, isBackup := strings.CutPrefix(backup, backupPrefix)
		if isOlder || strings.HasPrefix(backup, hidden) && !(isBackup && c.installed.has(swapPrefix+name)) {
			errs = append(errs, c.backups.remove(backup))
		}
	}
	return errors.Join(errs...)
}

// isWhole reports whether a sensor is in its place. One without its executable is half removed.
func (c *change) isWhole(name string) (bool, error) {
	d, err := c.installed.open(name, syscall.O_DIRECTORY)
	switch {
	case err == nil:
		_, err = os.Lstat(d.at(c.sensors.executable))
		d.Close()
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP), errors.Is(err, fs.ErrPermission):
		return true, nil // perhaps an administrator's link
	}
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// keepOld makes a backup of the version that was replaced, and renames that version to .picket-gone-NAME, as
// runs may be in it. The name of the backup holds the local time. If the clock is behind, it holds the
// second after that of the newest backup, so that the names keep the order of age.
func (c *change) keepOld(file, name string) error {
	if strings.HasPrefix(file, oldPrefix) { // an older picket made no backup yet
		err := c.backups.remove(backupPrefix + name) // half made
		if err = errors.Join(err, c.copy(c.installed, file, c.backups, backupPrefix+name)); err != nil {
			return err
		}
	}
	backups, err := c.backupsOf(name)
	if err != nil {
		return err
	}
	stamp := time.Now().Format(backupLayout)
	if n := len(backups); n > 0 {
		newest, _ := time.Parse(backupLayout, strings.TrimPrefix(backups[n-1], name+"_")) // it has this form
		stamp = max(stamp, newest.Add(time.Second).Format(backupLayout))
	}
	if c.backups.has(backupPrefix + name) { // else it was made before the power went
		if err := c.backups.rename(backupPrefix+name, c.backups, name+"_"+stamp); err != nil {
			return err
		}
	}
	gone := gonePrefix + name // if the remove fails, so does the rename
	return errors.Join(c.installed.remove(gone), c.installed.rename(file, c.installed, gone))
}

// versionOf splits the hidden name of a version that settle may need. Of any other name it returns "".
func versionOf(file string) (prefix, name string) {
	for _, prefix := range []string{swapPrefix, oldPrefix, olderPrefix, nextPrefix} {
		name, ok := strings.CutPrefix(file, prefix)
		if _, err := sensorName(name); ok && err == nil { // above all it is not ".."
			return prefix, name
		}
	}
	return "", ""
}

// backupsOf lists the backups of a sensor, the oldest first.
func (c *change) backupsOf(name string) ([]string, error) {
	files, err := c.backups.names()
	return slices.DeleteFunc(files, func(file string) bool {
		stamp, ok := strings.CutPrefix(file, name+"_")
		_, err := time.Parse(backupLayout, stamp)
		return !ok || err != nil
	}), err
}

// prune removes, and logs, the oldest backups of the sensor, so that keep of them remain; 0 removes none.
func (c *change) prune() error {
	backups, err := c.backupsOf(c.name)
	gone := gonePrefix + c.name // hidden, because half of it must not be taken for a backup
	for ; c.keep > 0 && len(backups) > c.keep; backups = backups[1:] {
		failed := errors.Join(c.backups.rename(backups[0], c.backups, gone), c.backups.remove(gone))
		if failed == nil {
			log.Printf(notice+"backup %s: removed, as [sensor] keep is %d", backups[0], c.keep)
		}
		err = errors.Join(err, failed)
	}
	return err
}

// copy copies a sensor, or part of one, with its owner. When it returns nil, the copy is on the disk.
// It links what it can, which takes no space, and copies symbolic links as links.
func (c *change) copy(from dir, name string, to dir, as string) error {
	if to.do("link", as, func(path string) error { return os.Link(from.at(name), path) }) == nil {
		return nil
	}
	if target, err := os.Readlink(from.at(name)); err == nil { // of an administrator's own sensor
		return to.do("link", as, func(path string) error { return os.Symlink(target, path) })
	}
	f, err := from.open(name, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return err
	case info.Mode().IsRegular():
		if err := to.enoughSpace(info.Size()); err != nil {
			return err
		}
		return to.write(as, io.LimitReader(f, info.Size()), info.Mode().Perm(), ownerOf(info))
	case !info.IsDir():
		return fmt.Errorf("copy %s: neither a file nor a directory", f.Name())
	}
	target, err := to.mkdir(as, info.Mode().Perm()|0o700)
	if err != nil {
		return err
	}
	defer target.Close()
	names, err := f.names()
	for i := 0; err == nil && i < len(names); i++ {
		err = c.copy(f, names[i], target, names[i])
	}
	// The owner gets it last: until here he cannot change it.
	return errors.Join(err, chown(target.File, ownerOf(info)), syncFile(target.File))
}

// A dir is an open directory. All its methods work in that directory and nowhere else, whatever its
// owner exchanges meanwhile: names are single path elements, and no link is followed. Before each
// change they call updater.step.
type dir struct {
	*os.File
	step func(what string) error
}

// at returns a path that leads to a name in this very directory, wherever somebody has moved that. Only
// calls that do not follow a link at its end may use it. Without a /proc it is the usual path.
func (d dir) at(name string) string {
	if open := fmt.Sprintf("/proc/self/fd/%d", d.Fd()); exists(open) {
		return filepath.Join(open, name)
	}
	return d.path(name)
}

// has reports whether there is anything with this name, or may be: the disk may not tell.
func (d dir) has(name string) bool {
	_, err := os.Lstat(d.at(name))
	return !errors.Is(err, fs.ErrNotExist)
}

// names lists the directory, in the order of bytes.
func (d dir) names() ([]string, error) {
	d.Seek(0, io.SeekStart) // the directory may have been listed before
	names, err := d.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// path returns the usual path of a name, for messages and for children.
func (d dir) path(name string) string { return filepath.Join(d.Name(), name) }

// open opens a file or directory, for reading unless the flags say more. It follows no link, waits for no pipe.
func (d dir) open(name string, flags int) (dir, error) {
	if strings.Count(d.Name(), "/") >= maxNesting {
		return dir{}, fmt.Errorf("%s: in more than %d directories", d.Name(), maxNesting)
	}
	flags |= syscall.O_NOFOLLOW | syscall.O_NONBLOCK | syscall.O_CLOEXEC
	fd, err := syscall.Openat(int(d.Fd()), name, flags, 0o600)
	if err != nil {
		return dir{}, &os.PathError{Op: "open", Path: d.path(name), Err: err}
	}
	return dir{os.NewFile(uintptr(fd), d.path(name)), d.step}, nil
}

// create makes a file and opens it for reading and writing.
func (d dir) create(name string) (f dir, err error) {
	err = d.do("create", name, func(string) error {
		f, err = d.open(name, syscall.O_CREAT|syscall.O_EXCL|syscall.O_RDWR)
		return err
	})
	return f, err
}

// do calls step, then makes a change at the path of a name. Its error shows the usual path, not that in /proc.
func (d dir) do(what, name string, change func(path string) error) error {
	if d.step != nil {
		if err := d.step(what + " " + d.path(name)); err != nil {
			return err
		}
	}
	err := change(d.at(name))
	if inner := errors.Unwrap(err); inner != nil {
		err = &os.PathError{Op: what, Path: d.path(name), Err: inner}
	}
	return err
}

// rename renames a file or directory. When it returns nil, the new name is on the disk.
func (d dir) rename(name string, to dir, newName string) error {
	if err := d.do("rename", name, func(path string) error { return os.Rename(path, to.at(newName)) }); err != nil {
		return err
	}
	return syncFile(to.File)
}

// mkdir makes a directory, with this mode whatever the umask, and opens it. It fails if the owner of
// the outer directory has put another one in its place meanwhile.
func (d dir) mkdir(name string, mode fs.FileMode) (dir, error) {
	if err := d.do("mkdir", name, func(path string) error { return os.Mkdir(path, 0o700) }); err != nil {
		return dir{}, err
	}
	made, err := d.open(name, syscall.O_DIRECTORY)
	if err != nil {
		return dir{}, err
	}
	info, err := made.Stat()
	names, err2 := made.names()
	if err = errors.Join(err, err2); err == nil && (len(names) > 0 || int(ownerOf(info).Uid) != os.Geteuid()) {
		err = fmt.Errorf("mkdir %s: somebody has exchanged it", made.Name())
	}
	if err == nil {
		err = made.Chmod(mode)
	}
	if err != nil {
		made.Close()
	}
	return made, err
}

// write makes a file with this content and mode, and syncs it. Root gives it to the owner, if there is one.
func (d dir) write(name string, from io.Reader, mode fs.FileMode, owner *syscall.Stat_t) error {
	f, err := d.create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, from); err != nil {
		return err
	}
	return errors.Join(chown(f.File, owner), f.Chmod(mode), f.Sync())
}

// remove removes a name with all that is in it, and follows no link. A name that does not exist is no error.
func (d dir) remove(name string) error {
	err := d.do("remove", name, os.Remove)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if !errors.Is(err, fs.ErrExist) { // it is gone, or no directory with something in it
		return err
	}
	d.step = nil           // for a test it is one step
	if os.Geteuid() != 0 { // a trial may have left a directory that its owner cannot enter; root can
		os.Chmod(d.at(name), 0o700)
	}
	inner, errOpen := d.open(name, syscall.O_DIRECTORY)
	if errOpen != nil {
		return err
	}
	defer inner.Close()
	names, _ := inner.names()
	for _, name := range names {
		if err := inner.remove(name); err != nil {
			return err
		}
	}
	return d.do("remove", name, os.Remove)
}

// enoughSpace returns an error if size more bytes would leave less than spaceReserve of the file system
// free, or if it can hold only a few more files.
func (d dir) enoughSpace(size int64) error {
	var s syscall.Statfs_t
	syscall.Fstatfs(int(d.Fd()), &s) // where that fails, only writing tells
	if s.Files > 0 && s.Ffree < spaceReserve/dirSpace {
		return fmt.Errorf("no space: %d files can still be made in %s", s.Ffree, d.Name())
	}
	free := int64(s.Bavail) * int64(s.Bsize)
	if s.Blocks > 0 && free-size < spaceReserve { // ramfs has no blocks
		return fmt.Errorf("no space: %d bytes free in %s, %d needed and %d to be left",
			free, d.Name(), size, spaceReserve)
	}
	return nil
}

// fetch writes the package to the staging directory. No sensor can have the name of the file.
func (c *change) fetch() error {
	f, err := c.staging.create(".package")
	if err != nil {
		return err
	}
	c.archive = f.File
	to := writerFunc(func(p []byte) (int, error) {
		if err := f.enoughSpace(int64(len(p))); err != nil {
			return 0, err
		}
		return f.Write(p)
	})
	if err := c.from(c.ctx, "", atMost(c.maxPackage, "larger than max_package, %d bytes", to)); err != nil {
		return fmt.Errorf("fetch: %w", err)
	}
	return nil
}

// verify checks the signature of the package with the key whose number it names, before any byte of the
// package is parsed. If no key is set, it takes every package.
func (c *change) verify() error {
	if c.keys == "" {
		return nil
	}
	keys, err := readKeys(c.keys)
	if err != nil {
		return fmt.Errorf("verify: public key: %w", err)
	}
	var text bytes.Buffer
	if err := c.from(c.ctx, ".sig", atMost(maxKeyFile, "larger than %d bytes", &text)); err != nil {
		return fmt.Errorf("verify: signature: %w", err)
	}
	number, signature, err := parseSignify(text.Bytes(), ed25519.SignatureSize)
	if err != nil {
		return fmt.Errorf("verify: signature: %w", err)
	}
	key, ok := keys[number]
	if !ok {
		return fmt.Errorf("verify: signed with key %x, which is not known", number)
	}
	// Mapped, the package takes no memory of the heap. An empty one cannot be mapped, nor one of unknown size.
	size, _ := c.archive.Seek(0, io.SeekEnd)
	message, err := syscall.Mmap(int(c.archive.Fd()), 0, int(size), syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("verify: map %d bytes: %w", size, err)
	}
	defer syscall.Munmap(message)
	if !ed25519.Verify(key, message, signature) {
		return errors.New("verify: the signature does not fit the package")
	}
	return nil
}

// readKeys reads a public key, or each NAME.pub of a directory. It returns at least one, by number.
func readKeys(file string) (map[string]ed25519.PublicKey, error) {
	dir, names, keys := "", []string{file}, make(map[string]ed25519.PublicKey)
	if info, err := os.Stat(file); err == nil && info.IsDir() {
		dir = file
		names, _ = fs.Glob(os.DirFS(dir), "[^.]*.pub") // a hidden one is no key, such as macOS's ._fleet.pub
	}
	for _, name := range names {
		name = filepath.Join(dir, name)
		text, err := readSmall(name, maxKeyFile)
		if err != nil {
			return nil, err
		}
		number, key, err := parseSignify(text, ed25519.PublicKeySize)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		keys[number] = key
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("no *.pub in %s", file)
	}
	return keys, nil
}

// parseSignify reads a key or a signature of signify: a line of comment, and a line of base64 with
// "Ed", 8 bytes of key number and size bytes of data. Nothing else may be in it, but lines may end as
// editors and Windows end them.
func parseSignify(text []byte, size int) (number string, data []byte, err error) {
	comment, rest, _ := strings.Cut(string(text), "\n")
	data, err = base64.StdEncoding.Strict().DecodeString(strings.TrimSpace(rest)) // it skips ends of lines
	switch {
	case !strings.HasPrefix(comment, "untrusted comment: "):
		return "", nil, errors.New("its first line is no untrusted comment")
	case err != nil:
		return "", nil, fmt.Errorf("its second line is not base64: %w", err)
	case len(data) != 2+8+size || string(data[:2]) != "Ed":
		return "", nil, fmt.Errorf("its second line is not \"Ed\" and %d bytes", 8+size)
	}
	return string(data[2:10]), data[10:], nil
}

// unpack unpacks the package into the staging directory. An archive that is cut off, even between two
// entries, is an error. What follows the end of an archive is ignored. unpack fails when more comes than
// may be unpacked: a package of 785 bytes can unpack to 1 GiB.
func (c *change) unpack() error {
	packed := bufio.NewReader(io.NewSectionReader(c.archive, 0, c.maxPackage))
	var contents io.Reader = packed
	var err error
	switch magic, _ := packed.Peek(3); { // an error comes again
	case string(magic) == "BZh":
		contents = bzip2.NewReader(packed)
	case strings.HasPrefix(string(magic), "\x1f\x8b"):
		contents, err = gzip.NewReader(packed)
	}
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	meter := atMost(c.maxUnpacked, "unpacks to more than max_unpacked, %d bytes", io.Discard)
	limited := io.TeeReader(contents, meter)
	// Reading on fails, but tar reads no further than to the two blocks of zeros that end an archive.
	cutOff, end := io.Pipe()
	end.CloseWithError(errors.New("the archive is cut off"))
	r := tar.NewReader(io.MultiReader(limited, cutOff))
	h, err := r.Next()
	for ; err == nil; h, err = r.Next() {
		if err := c.entry(h, r); err != nil {
			return fmt.Errorf("unpack %s: %w", cut(h.Name), err)
		}
	}
	if errors.Is(err, io.EOF) {
		_, err = io.Copy(io.Discard, limited) // at the very end checksums are compared
	}
	if err == nil && !c.staging.has(c.name) {
		err = fmt.Errorf("no directory %s in the package", cut(c.name))
	}
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	return nil
}

// entry unpacks one entry of the package, or returns why it does not belong there.
func (c *change) entry(h *tar.Header, r io.Reader) error {
	name, err := entryName(h)
	if err != nil || name == "" {
		return err
	}
	if top, _, _ := strings.Cut(name, "/"); top != c.name {
		return fmt.Errorf("not in the directory %s, the sensor that the package is for", cut(c.name))
	}
	mode := fs.FileMode(h.Mode) & 0o775 // no setuid, setgid, sticky, and not for everybody to write
	folder := name
	if h.Typeflag == tar.TypeReg {
		folder = path.Dir(name)
	}
	d, err := c.directory(folder)
	if err != nil {
		return err
	}
	defer d.Close()
	if h.Typeflag == tar.TypeDir {
		return d.Chmod(mode | 0o700)
	}
	if err := c.count(h.Size, d); err != nil {
		return err
	}
	return d.write(path.Base(name), r, mode|0o400, nil)
}

// entryName returns the plain path of an entry, or "" if it is left out. It refuses what no sensor needs.
func entryName(h *tar.Header) (string, error) {
	name := strings.TrimSuffix(strings.TrimPrefix(h.Name, "./"), "/")
	forAll, isFile, isDir := h.Typeflag == tar.TypeXGlobalHeader, h.Typeflag == tar.TypeReg, h.Typeflag == tar.TypeDir
	bad := "" // a record of the header that is refused
	for record := range h.PAXRecords {
		isHarmless := record == "comment" || strings.HasSuffix(record, "time") // git archive writes the commit
		if forAll && !isHarmless || strings.HasPrefix(record, "GNU.sparse") {
			bad = record
		}
	}
	switch {
	case forAll && bad != "":
		return "", fmt.Errorf("a header that sets %s of all entries", cut(bad))
	case forAll, isDir && (name == "" || name == "."): // the directory that tar was called in
		return "", nil
	case isFile && strings.HasPrefix(path.Base(name), "._"): // macOS keeps attributes of a file there
		return "", nil
	case h.Typeflag == tar.TypeSymlink, h.Typeflag == tar.TypeLink:
		return "", errors.New("links are refused")
	case !isFile && !isDir:
		return "", fmt.Errorf("neither a file nor a directory (type %q)", h.Typeflag)
	case bad != "":
		return "", errors.New("sparse files are refused")
	case slices.Contains(strings.Split(name, "/"), ".."):
		return "", errors.New("path escapes the package")
	case len(name) > maxPath:
		return "", fmt.Errorf("a name of more than %d bytes", maxPath)
	case oneLine(name) != name || !fs.ValidPath(name):
		return "", errors.New("not a plain path")
	}
	return name, nil
}

// directory opens a directory of the package, or makes it with mode 755, which its entry may change later.
func (c *change) directory(name string) (dir, error) {
	if name == "." {
		return c.staging.open(".", syscall.O_DIRECTORY)
	}
	parent, err := c.directory(path.Dir(name))
	if err != nil {
		return dir{}, err
	}
	defer parent.Close()
	if parent.has(path.Base(name)) {
		return parent.open(path.Base(name), syscall.O_DIRECTORY)
	}
	if err := c.count(0, parent); err != nil {
		return dir{}, err
	}
	return parent.mkdir(path.Base(name), 0o755)
}

// count counts a file or directory of the package, including one that appears only in the path of a
// file. It fails if there are too many, or if there is no space for size bytes of content.
func (c *change) count(size int64, in dir) error {
	if c.entries++; c.entries > maxEntries {
		return fmt.Errorf("more than %d entries", maxEntries)
	}
	return in.enoughSpace(size + dirSpace)
}

// checkVersion refuses a package that is older than the installed version or than one of its
// backups. Whoever controls the network may send an old package again, and its signature is valid.
func (c *change) checkVersion() error {
	offered, err := c.staging.version(c.name)
	if err != nil {
		return fmt.Errorf("version: %w", err)
	}
	backups, err := c.backupsOf(c.name)
	newest, _ := c.installed.version(c.name) // without a valid one there is nothing to compare
	for _, backup := range backups {
		if v, _ := c.backups.version(backup); slices.Compare(v, newest) > 0 {
			newest = v
		}
	}
	dotted := func(v []uint64) string { return strings.ReplaceAll(strings.Trim(fmt.Sprint(v), "[]"), " ", ".") }
	switch {
	case err != nil || slices.Compare(offered, newest) >= 0:
		return err
	case offered == nil:
		return fmt.Errorf("version: none in the package; %s is known here", dotted(newest))
	}
	return fmt.Errorf("version: %s is older than %s, which is known here", dotted(offered), dotted(newest))
}

// version reads the file version of a sensor, decimal numbers with dots between them. It returns nil
// if there is no such file. 1.0 is the same version as 1.
func (d dir) version(name string) (version []uint64, err error) {
	sensor, err := d.open(name, syscall.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer sensor.Close()
	f, err := sensor.open("version", 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	f.SetReadDeadline(time.Now()) // a pipe may keep its reader waiting for ever; a file cannot
	text, err := io.ReadAll(io.LimitReader(f, maxVersion+1))
	if err != nil {
		return nil, err
	}
	for _, part := range strings.Split(strings.TrimSpace(string(text)), ".") {
		n, err := strconv.ParseUint(part, 10, 64)
		if err != nil || len(text) > maxVersion {
			return nil, fmt.Errorf("%s is not a version such as 1.4.2", cut(string(text)))
		}
		version = append(version, n)
	}
	for len(version) > 1 && version[len(version)-1] == 0 {
		version = version[:len(version)-1]
	}
	return version, nil
}

// nextMonitor asks the monitor where to move to, and returns that URL if a monitor answers there.
// check makes a URL of the answer, or refuses it. A move from https to http is refused.
func nextMonitor(ctx context.Context, c *client, check func(string) (*url.URL, error)) (*url.URL, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	v, err := c.call(ctx, "cmd_get_new_monitor_url", host)
	text, ok := v.(string)
	if err == nil && !ok {
		err = fmt.Errorf("got %s; want string", typeName(v))
	}
	if err != nil {
		return nil, fmt.Errorf("cmd_get_new_monitor_url: %w", err)
	}
	u, err := check(text)
	switch {
	case err != nil:
		return nil, err
	case c.url.Scheme == "https" && u.Scheme != "https":
		return nil, fmt.Errorf("from https to %s, where everybody can read and change what is sent", masked(u.String()))
	}
	next := newClient(u, c.timeout, c.tls)
	defer next.close()
	if err := checkHealth(ctx, next); err != nil {
		return nil, fmt.Errorf("healthcheck of %s: %w", masked(u.String()), err)
	}
	log.Printf("monitor %s: answers", masked(u.String()))
	return u, nil
}

// checkHealth returns an error unless the monitor of a client answers that it is well.
func checkHealth(ctx context.Context, c *client) error {
	v, err := c.call(ctx, "healthcheck")
	if err == nil && v != "OK" {
		err = fmt.Errorf("got %s", cut(fmt.Sprint(v)))
	}
	return err
}
