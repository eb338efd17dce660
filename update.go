package main

// The commands that change the agent itself: new code for a sensor, the way
// back from it, and the move to another monitor.
//
// A package is SENSOR.tar.bz2 (gzip and plain tar are taken, too) with one
// directory at the top, the sensor's name:
//
//	disk/
//	disk/check
//	disk/version         1.4.2: no older version replaces this one
//
// Its signature, SENSOR.tar.bz2.sig, is what OpenBSD's signify and OpenWrt's
// usign write, and so are the public keys:
//
//	untrusted comment: verify with fleet.pub
//	RWQ...               base64 of "Ed", 8 bytes of key number, 64 bytes of signature or 32 of key
//
// An update goes through these names, and recover knows from them how far it
// had come when the power went:
//
//	sensors/.picket-lock        is locked by the process that changes sensors
//	sensors/.picket-staging     the package and what is unpacked of it: worth nothing
//	sensors/.picket-trial-disk  complete, being tried: worth nothing
//	sensors/.picket-new-disk    complete, tried and on the disk
//	sensors/.picket-old-disk    the version that gives way, for an instant
//	sensors_backup/disk_2010-03-07T21:24:33
//	sensors_backup/.disk_2010-03-07T21:24:33   being copied or removed: worth nothing

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
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
	maxEntries   = 1024      // files and directories in a package
	maxPath      = 255       // bytes of an entry's name
	maxPadding   = 1 << 20   // bytes of zeros behind the last entry: tar pads to 10 KiB
	maxKeyFile   = 4 << 10   // bytes of a public key or signature: they have about 150
	maxVersion   = 256       // bytes of a file named version
	spaceReserve = 256 << 10 // bytes of a file system that an update leaves free

	dirSpace = 4 << 10     // bytes that a directory is taken to need
	lockTime = time.Minute // to wait for another process that changes sensors

	lockName     = ".picket-lock"
	stagingName  = ".picket-staging"
	trialPrefix  = ".picket-trial-"
	newPrefix    = ".picket-new-"
	oldPrefix    = ".picket-old-"
	backupLayout = "2006-01-02T15:04:05"
)

// An updater replaces sensors by packages, and by their backups.
//
// Whatever fails, power included, at every moment the old version or the new
// one is complete in its place for whoever asks the sensors, and after recover
// nothing else is left.
type updater struct {
	sensors     *sensors
	backup      string // the directory of backups
	keys        string // a public key, or a directory of them; "" takes unsigned packages
	maxPackage  int64  // bytes
	maxUnpacked int64  // bytes
	keep        int    // backups of a sensor; 0 keeps all

	progress func(step string)       // is told what is being done
	change   func(what string) error // is asked before each change of the file system
}

// newUpdater returns an updater that reports to nobody.
func newUpdater(s *sensors, backup, keys string, maxPackage, maxUnpacked int64, keep int) *updater {
	return &updater{
		sensors: s, backup: backup, keys: keys, maxPackage: maxPackage, maxUnpacked: maxUnpacked, keep: keep,
		progress: func(string) {}, change: func(string) error { return nil },
	}
}

// A source is where a package comes from.
type source struct {
	archive   func(ctx context.Context, to io.Writer) error
	signature func(ctx context.Context) ([]byte, error)
}

// fromMonitor is the package of a sensor as the monitor has it, up to a limit
// of bytes.
func fromMonitor(c *client, name string, limit int64) source {
	return source{
		archive: func(ctx context.Context, to io.Writer) error {
			return c.fetch(ctx, to, limit, "cmd_get_sensor_code", name)
		},
		signature: func(ctx context.Context) ([]byte, error) {
			v, err := c.call(ctx, "cmd_get_sensor_signature", name)
			switch v := v.(type) {
			case []byte:
				return v, err
			case string:
				return []byte(v), err
			}
			if err == nil {
				err = fmt.Errorf("got %s; want base64 or string", typeName(v))
			}
			return nil, err
		},
	}
}

// fromFile is a package that lies on the box, its signature beside it.
func fromFile(file string) source {
	return source{
		archive: func(_ context.Context, to io.Writer) error {
			f, err := os.Open(file)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = io.Copy(to, f)
			return err
		},
		signature: func(context.Context) ([]byte, error) { return readSmall(file+".sig", maxKeyFile) },
	}
}

// at is a path in the directory of sensors.
func (u *updater) at(elements ...string) string {
	return filepath.Join(append([]string{u.sensors.path}, elements...)...)
}

// install fetches a package, verifies it, unpacks it, tries it and puts it in
// the place of the sensor, whose version before becomes a backup. An error
// means that nothing has changed.
func (u *updater) install(ctx context.Context, name string, from source) error {
	return u.exclusively(ctx, name, lockTime, func() error {
		archive, err := u.fetch(ctx, from)
		if err != nil {
			return err
		}
		if err := u.verify(ctx, archive, from); err != nil {
			return err
		}
		u.progress("unpack")
		if err := u.unpack(archive, name); err != nil {
			return err
		}
		if err := u.checkVersion(name); err != nil {
			return err
		}
		if err := u.moveSynced(u.at(stagingName, name), u.at(trialPrefix+name)); err != nil {
			return err
		}
		u.progress("try")
		switch o := u.sensors.runIn(ctx, u.at(trialPrefix+name), trialPrefix+name, []string{u.sensors.help}, nil); o.code {
		case 0:
		case codeNotFound:
			return fmt.Errorf("it holds no executable %s", u.sensors.executable)
		default:
			return fmt.Errorf("try %s %s: %s", u.sensors.executable, u.sensors.help, o)
		}
		if err := u.moveSynced(u.at(trialPrefix+name), u.at(newPrefix+name)); err != nil {
			return err
		}
		u.progress("swap")
		if err := u.swap(ctx, name); err != nil {
			return err
		}
		u.tidy(u.prune(name))
		return nil
	})
}

// rollback puts the newest backup of a sensor in its place. The version before
// becomes a backup, the one that was put back is none any more.
func (u *updater) rollback(ctx context.Context, name string) error {
	return u.exclusively(ctx, name, lockTime, func() error {
		backups, err := u.backups(name)
		if err != nil {
			return err
		}
		if len(backups) == 0 {
			return errors.New("there is no backup")
		}
		newest := backups[len(backups)-1]
		u.progress("copy")
		if err := u.mkdir(u.at(stagingName), 0o700); err != nil {
			return err
		}
		if err := u.copyDir(filepath.Join(u.backup, newest), u.at(stagingName, name), os.Link); err != nil {
			return err
		}
		if err := u.moveSynced(u.at(stagingName, name), u.at(newPrefix+name)); err != nil {
			return err
		}
		u.progress("swap")
		if err := u.swap(ctx, name); err != nil {
			return err
		}
		u.tidy(u.removeBackup(newest))
		u.tidy(u.prune(name))
		return nil
	})
}

// exclusively does work while no other process changes these sensors, after
// an interrupted change of before was settled, and leaves no staging.
func (u *updater) exclusively(ctx context.Context, name string, wait time.Duration, work func() error) error {
	for _, dir := range []string{u.sensors.path, u.backup} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	path, err := os.Stat(u.sensors.path)
	if err != nil {
		return err
	}
	backup, err := os.Stat(u.backup)
	if err != nil {
		return err
	}
	if os.SameFile(path, backup) {
		return fmt.Errorf("%s and %s are the same directory", u.sensors.path, u.backup)
	}
	lock, err := os.OpenFile(u.at(lockName), os.O_RDWR|os.O_CREATE, 0o600) // for nobody else to hold
	if err != nil {
		return err
	}
	defer lock.Close()
	if owner := path.Sys().(*syscall.Stat_t); os.Geteuid() == 0 { // an agent that is not root must get at it, too
		if err := lock.Chown(int(owner.Uid), int(owner.Gid)); err != nil {
			return err
		}
	}
	if err := flockWithin(ctx, lock, syscall.LOCK_EX, wait); err != nil {
		return fmt.Errorf("another process is changing the sensors: %w", err)
	}
	err = u.settle()
	if name != "" && (exists(u.at(oldPrefix+name)) || exists(u.at(newPrefix+name))) {
		return fmt.Errorf("an earlier change is not settled: %w", err)
	}
	u.tidy(err)
	if err := work(); err != nil {
		u.tidy(u.abandon(name))
		return err
	}
	u.tidy(u.settle())
	return nil
}

// tidy logs what went wrong after a change was made: too late to call it off,
// and recover will try again.
func (u *updater) tidy(err error) {
	if err != nil {
		log.Printf(warning+"tidy sensors: %v", err)
	}
}

// abandon undoes what a change that failed has made, so that settle does not
// finish it.
func (u *updater) abandon(name string) error {
	if err := u.undo(name); err != nil {
		return err // recover will decide
	}
	if exists(u.at(newPrefix + name)) {
		if err := u.drop(newPrefix, name); err != nil {
			return err
		}
	}
	return u.settle()
}

// recover finishes or undoes what a power cut interrupted. It can be
// interrupted and repeated itself. Where nothing was, it writes nothing.
func (u *updater) recover(ctx context.Context) error {
	if !u.interrupted() {
		return nil
	}
	err := u.exclusively(ctx, "", 0, u.pruneAll)
	if errors.Is(err, context.DeadlineExceeded) {
		return nil // another process is at it
	}
	return err
}

// interrupted reports whether there is anything to recover.
func (u *updater) interrupted() bool {
	entries, _ := os.ReadDir(u.sensors.path)
	for _, e := range entries {
		if name := e.Name(); strings.HasPrefix(name, ".picket-") && name != lockName {
			return true
		}
	}
	entries, _ = os.ReadDir(u.backup)
	count := make(map[string]int)
	for _, e := range entries {
		if isHidden(e.Name()) {
			return true
		}
		if name, ok := backedUp(e.Name()); ok {
			if count[name]++; u.keep > 0 && count[name] > u.keep {
				return true
			}
		}
	}
	return false
}

// settle brings the two directories into one of the states that mean
// something: what is complete is put in its place, the rest removed. What goes
// wrong with one sensor does not keep it from the others.
func (u *updater) settle() error {
	var errs []error
	entries, err := os.ReadDir(u.sensors.path)
	errs = append(errs, err)
	for _, e := range entries {
		if name := e.Name(); name == stagingName || strings.HasPrefix(name, trialPrefix) {
			errs = append(errs, u.removeAll(u.at(name)))
		}
	}
	for _, e := range entries {
		if name, ok := strings.CutPrefix(e.Name(), newPrefix); ok {
			errs = append(errs, u.settleNew(name))
		}
	}
	for _, e := range entries {
		if name, ok := strings.CutPrefix(e.Name(), oldPrefix); ok && !exists(u.at(name)) {
			errs = append(errs, u.moveSynced(u.at(oldPrefix+name), u.at(name)))
		}
	}
	backups, err := os.ReadDir(u.backup)
	errs = append(errs, err)
	for _, e := range backups {
		if isHidden(e.Name()) {
			errs = append(errs, u.removeAll(filepath.Join(u.backup, e.Name())))
		}
	}
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), oldPrefix)
		if ok && exists(u.at(e.Name())) && !exists(u.at(newPrefix+name)) { // else settleNew has failed
			errs = append(errs, u.settleOld(name))
		}
	}
	return errors.Join(errs...)
}

// settleNew finishes a swap in which the old version is out of the way, or
// copied (see takeAway), or never was; else the swap had not begun.
func (u *updater) settleNew(name string) error {
	switch {
	case !exists(u.at(name)):
	case exists(u.at(oldPrefix + name)):
		if err := u.removeAll(u.at(name)); err != nil {
			return err
		}
	default:
		return u.drop(newPrefix, name)
	}
	return u.moveSynced(u.at(newPrefix+name), u.at(name))
}

// drop removes the new or the old version of a sensor, which is worth nothing
// from the first moment on: half removed, it must not be taken for whole.
func (u *updater) drop(prefix, name string) error {
	if err := u.moveSynced(u.at(prefix+name), u.at(trialPrefix+name)); err != nil {
		return err
	}
	return u.removeAll(u.at(trialPrefix + name))
}

// settleOld makes a backup of the version that gave way.
func (u *updater) settleOld(name string) error {
	to, err := u.nextBackup(name)
	if err != nil {
		return err
	}
	if err := u.moveSynced(u.at(oldPrefix+name), to); !errors.Is(err, syscall.EXDEV) {
		return err
	}
	if err := u.copyBackup(u.at(oldPrefix+name), to); err != nil {
		return err
	}
	if err := u.moveSynced(hidden(to), to); err != nil {
		return err
	}
	return u.drop(oldPrefix, name)
}

func exists(file string) bool {
	_, err := os.Lstat(file)
	return err == nil
}

// swap puts .picket-new-NAME in the place of the sensor. Readings of the sensor that
// run have ended by then, others wait meanwhile.
func (u *updater) swap(ctx context.Context, name string) error {
	deployed := !exists(u.at(name))
	to, err := u.nextBackup(name)
	if err != nil {
		return err
	}
	apart := false // the backups are on another file system: what takes time is done before
	if !deployed {
		if apart, err = u.apart(); err != nil {
			return err
		}
		if apart {
			if err := u.copyBackup(u.at(name), to); err != nil {
				return err
			}
		}
	}
	err = u.sensors.whileUnused(ctx, name, func() error {
		err := error(nil)
		if !deployed {
			err = u.takeAway(name)
		}
		if err == nil {
			err = u.move(u.at(newPrefix+name), u.at(name))
		}
		switch {
		case err != nil || deployed:
		case apart:
			err = u.move(hidden(to), to)
		default:
			err = u.move(u.at(oldPrefix+name), to)
		}
		if err != nil {
			u.tidy(u.undo(name)) // before anybody sees the gap
		}
		return err
	})
	if err != nil {
		return err
	}
	u.tidy(syncDirs([]string{u.sensors.path, u.backup})) // it is done, as all can see
	if apart {
		u.tidy(u.drop(oldPrefix, name))
	}
	return nil
}

// takeAway moves the installed version out of the way. On an overlay file
// system a directory of the lower layer cannot be renamed: it is copied, and
// then removed.
func (u *updater) takeAway(name string) error {
	err := u.moveSynced(u.at(name), u.at(oldPrefix+name))
	if !errors.Is(err, syscall.EXDEV) {
		return err
	}
	if err := u.removeAll(u.at(stagingName)); err != nil {
		return err
	}
	if err := u.mkdir(u.at(stagingName), 0o700); err != nil {
		return err
	}
	if err := u.copyDir(u.at(name), u.at(stagingName, name), nil); err != nil {
		return err
	}
	if err := u.moveSynced(u.at(stagingName, name), u.at(oldPrefix+name)); err != nil {
		return err
	}
	return u.removeAll(u.at(name))
}

// undo puts the version that gave way back in its place, if there is one.
func (u *updater) undo(name string) error {
	if !exists(u.at(oldPrefix + name)) {
		return nil
	}
	var err error
	switch {
	case !exists(u.at(name)):
	case exists(u.at(newPrefix + name)): // the old one, perhaps half removed
		err = u.removeAll(u.at(name))
	default:
		err = u.move(u.at(name), u.at(newPrefix+name))
	}
	if err != nil {
		return err
	}
	return u.moveSynced(u.at(oldPrefix+name), u.at(name))
}

// apart reports whether a sensor cannot be renamed to become a backup. Trying
// is the only way to know: two mounts may be of one device.
func (u *updater) apart() (bool, error) {
	probe, to := u.at(stagingName, "probe"), hidden(filepath.Join(u.backup, "probe_"+backupLayout))
	if err := os.Mkdir(probe, 0o700); err != nil {
		return false, err
	}
	err := os.Rename(probe, to)
	if errors.Is(err, syscall.EXDEV) {
		return true, os.Remove(probe)
	}
	if err != nil {
		return false, err
	}
	return false, os.Remove(to)
}

// backups lists the backups of a sensor, oldest first.
func (u *updater) backups(name string) ([]string, error) {
	entries, err := os.ReadDir(u.backup)
	if err != nil {
		return nil, err
	}
	var backups []string
	for _, e := range entries {
		if of, ok := backedUp(e.Name()); ok && of == name {
			backups = append(backups, e.Name())
		}
	}
	return backups, nil
}

// nextBackup is the name of a new backup: the time, or where the clock is
// behind the newest backup a second after that, so that order is kept.
func (u *updater) nextBackup(name string) (string, error) {
	backups, err := u.backups(name)
	if err != nil {
		return "", err
	}
	now := time.Now()
	stamp := time.Date(now.Year(), now.Month(), now.Day(), now.Hour(), now.Minute(), now.Second(), 0, time.UTC) // local, with no zone
	if n := len(backups); n > 0 {
		newest, err := time.Parse(backupLayout, strings.TrimPrefix(backups[n-1], name+"_"))
		if err != nil {
			return "", err
		}
		if !stamp.After(newest) {
			stamp = newest.Add(time.Second)
		}
	}
	return filepath.Join(u.backup, name+"_"+stamp.Format(backupLayout)), nil
}

// prune removes the oldest backups of a sensor beyond those to keep.
func (u *updater) prune(name string) error {
	backups, err := u.backups(name)
	if err != nil || u.keep == 0 {
		return err
	}
	var errs []error
	for ; len(backups) > u.keep; backups = backups[1:] {
		errs = append(errs, u.removeBackup(backups[0]))
	}
	return errors.Join(errs...)
}

// pruneAll prunes the backups of every sensor.
func (u *updater) pruneAll() error {
	entries, err := os.ReadDir(u.backup)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if name, ok := backedUp(e.Name()); ok {
			if err := u.prune(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// backedUp returns the sensor of which there is a backup with this name.
func backedUp(backup string) (name string, ok bool) {
	i := len(backup) - len("_"+backupLayout)
	if i < 1 || backup[i] != '_' {
		return "", false
	}
	_, err := time.Parse(backupLayout, backup[i+1:])
	return backup[:i], err == nil && backup[0] != '.'
}

// removeBackup removes a backup, which is none from the first moment on.
func (u *updater) removeBackup(backup string) error {
	file := filepath.Join(u.backup, backup)
	if err := u.moveSynced(file, hidden(file)); err != nil {
		return err
	}
	return u.removeAll(hidden(file))
}

// hidden is the name of a backup that is being copied or removed.
func hidden(backup string) string {
	return filepath.Join(filepath.Dir(backup), "."+filepath.Base(backup))
}

// isHidden reports whether a name is one that hidden has made.
func isHidden(name string) bool {
	backup, ok := strings.CutPrefix(name, ".")
	if ok {
		_, ok = backedUp(backup)
	}
	return ok
}

// copyBackup copies a sensor to where a backup is made.
func (u *updater) copyBackup(from, to string) error {
	return u.copyDir(from, hidden(to), nil)
}

// The changes of the file system, each of which change is asked for before.

func (u *updater) mkdir(dir string, mode fs.FileMode) error {
	if err := u.change("mkdir " + dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, mode); err != nil {
		return err
	}
	return os.Chmod(dir, mode) // whatever the umask
}

func (u *updater) move(from, to string) error {
	if err := u.change("rename " + from); err != nil {
		return err
	}
	return os.Rename(from, to)
}

// moveSynced renames and, when it returns nil, has the new name on the disk.
func (u *updater) moveSynced(from, to string) error {
	if err := u.move(from, to); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(to)); err != nil {
		return err
	}
	if filepath.Dir(from) == filepath.Dir(to) {
		return nil
	}
	return syncDir(filepath.Dir(from))
}

func (u *updater) removeAll(file string) error {
	if err := u.change("remove " + file); err != nil {
		return err
	}
	if err := os.RemoveAll(file); err == nil {
		return nil
	}
	// A trial may have left directories that their owner cannot enter.
	filepath.WalkDir(file, func(name string, e fs.DirEntry, err error) error {
		if e != nil && e.IsDir() {
			os.Chmod(name, 0o700)
		}
		return nil
	})
	return os.RemoveAll(file)
}

// writeFile writes a file of a sensor, synced, and counts nothing.
func (u *updater) writeFile(file string, from io.Reader, mode fs.FileMode) error {
	if err := u.change("create " + file); err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, from); err != nil {
		return err
	}
	if err := u.change("sync " + file); err != nil {
		return err
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

// copyDir copies a directory, of which the copy is on the disk when it
// returns nil. Files are linked if there is a function for that and it can,
// which takes no space.
func (u *updater) copyDir(from, to string, link func(from, to string) error) error {
	var dirs []string
	err := filepath.WalkDir(from, func(file string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		inside, err := filepath.Rel(from, file)
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		target := filepath.Join(to, inside)
		switch {
		case e.IsDir():
			dirs = append(dirs, target)
			if err := u.mkdir(target, info.Mode().Perm()|0o700); err != nil {
				return err
			}
			return keepOwnerOf(info, target)
		case e.Type() == fs.ModeSymlink: // of an administrator's own sensor
			to, err := os.Readlink(file)
			if err != nil {
				return err
			}
			if err := os.Symlink(to, target); err != nil {
				return err
			}
			return keepOwnerOf(info, target)
		case !e.Type().IsRegular():
			return fmt.Errorf("copy %s: neither a file nor a directory", file)
		}
		if link != nil && link(file, target) == nil {
			return nil
		}
		if err := u.enoughSpace(filepath.Dir(target), info.Size()); err != nil {
			return err
		}
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := u.writeFile(target, f, info.Mode().Perm()); err != nil {
			return err
		}
		return keepOwnerOf(info, target)
	})
	if err != nil {
		return err
	}
	return syncDirs(dirs)
}

// keepOwnerOf gives a copy the owner of the original, if root makes it.
func keepOwnerOf(original fs.FileInfo, file string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	owner := original.Sys().(*syscall.Stat_t)
	return os.Lchown(file, int(owner.Uid), int(owner.Gid))
}

func syncDirs(dirs []string) error {
	for _, dir := range dirs {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// enoughSpace returns an error where size more bytes would not leave the
// reserve free.
func (u *updater) enoughSpace(dir string, size int64) error {
	var s syscall.Statfs_t
	if err := syscall.Statfs(dir, &s); err != nil {
		return &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	if s.Files > 0 && s.Ffree < spaceReserve/dirSpace {
		return fmt.Errorf("no space: %d files can still be made in %s", s.Ffree, dir)
	}
	if free := int64(s.Bavail) * int64(s.Bsize); s.Blocks > 0 && free-size < spaceReserve { // ramfs counts nothing
		return fmt.Errorf("no space: %d bytes free in %s, %d needed and %d to be left", free, dir, size, spaceReserve)
	}
	return nil
}

// fetch writes the package to the staging directory and returns its path.
func (u *updater) fetch(ctx context.Context, from source) (string, error) {
	if err := u.mkdir(u.at(stagingName), 0o700); err != nil {
		return "", err
	}
	file := u.at(stagingName, "package")
	if err := u.change("create " + file); err != nil {
		return "", err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	defer f.Close()
	w := &packageWriter{updater: u, file: f}
	if err := from.archive(ctx, w); err != nil {
		return "", fmt.Errorf("fetch: %w", err)
	}
	return file, f.Close()
}

// A packageWriter takes a package as it arrives, and no more than is allowed.
type packageWriter struct {
	*updater
	file    *os.File
	written int64
}

func (w *packageWriter) Write(p []byte) (int, error) {
	if w.written+int64(len(p)) > w.maxPackage {
		return 0, fmt.Errorf("larger than max_package, %d bytes", w.maxPackage)
	}
	if err := w.enoughSpace(filepath.Dir(w.file.Name()), int64(len(p))); err != nil {
		return 0, err
	}
	n, err := w.file.Write(p)
	w.written += int64(n)
	w.progress(fmt.Sprintf("fetch %d bytes", w.written))
	return n, err
}

// verify checks the package's signature, before anything in it is read as
// more than bytes.
func (u *updater) verify(ctx context.Context, archive string, from source) error {
	if u.keys == "" {
		return nil
	}
	u.progress("verify")
	keys, err := readKeys(u.keys)
	if err != nil {
		return fmt.Errorf("verify: public key: %w", err)
	}
	text, err := from.signature(ctx)
	if err != nil {
		return fmt.Errorf("verify: signature: %w", err)
	}
	number, signature, err := parseSignify(text, ed25519.SignatureSize)
	if err != nil {
		return fmt.Errorf("verify: signature: %w", err)
	}
	key, ok := keys[number]
	if !ok {
		return fmt.Errorf("verify: signed with key %s, which is not known", hex.EncodeToString([]byte(number)))
	}
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	var message []byte
	if info.Size() > 0 { // mapped, the package takes no memory of the heap
		message, err = syscall.Mmap(int(f.Fd()), 0, int(info.Size()), syscall.PROT_READ, syscall.MAP_SHARED)
		if err != nil {
			return &os.PathError{Op: "mmap", Path: archive, Err: err}
		}
		defer syscall.Munmap(message)
	}
	if !ed25519.Verify(key, message, signature) {
		return errors.New("verify: the signature does not fit the package")
	}
	return nil
}

// readKeys reads a public key, or all NAME.pub of a directory, by number.
func readKeys(file string) (map[string]ed25519.PublicKey, error) {
	files := []string{file}
	if info, err := os.Stat(file); err != nil {
		return nil, err
	} else if info.IsDir() {
		entries, err := os.ReadDir(file)
		if err != nil {
			return nil, err
		}
		files = nil
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".pub") {
				files = append(files, filepath.Join(file, e.Name()))
			}
		}
	}
	keys := make(map[string]ed25519.PublicKey)
	for _, file := range files {
		text, err := readSmall(file, maxKeyFile)
		if err != nil {
			return nil, err
		}
		number, key, err := parseSignify(text, ed25519.PublicKeySize)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		keys[number] = key
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("no *.pub in %s", file)
	}
	return keys, nil
}

// parseSignify reads a file of signify's: a comment, and base64 of "Ed", the
// key number and a key or signature of so many bytes. Nothing else may be
// in it.
func parseSignify(text []byte, size int) (number string, data []byte, err error) {
	comment, rest, ok := strings.Cut(string(text), "\n")
	switch {
	case !strings.HasPrefix(comment, "untrusted comment: "):
		return "", nil, errors.New("its first line is no untrusted comment")
	case !ok:
		return "", nil, errors.New("it has one line only")
	}
	line := strings.TrimSuffix(rest, "\n")
	if strings.ContainsAny(line, "\r\n") {
		return "", nil, errors.New("it has more than two lines")
	}
	data, err = base64.StdEncoding.Strict().DecodeString(line)
	switch {
	case err != nil:
		return "", nil, fmt.Errorf("its second line is not base64: %w", err)
	case len(data) != 2+8+size:
		return "", nil, fmt.Errorf("its second line holds %d bytes; want %d", len(data), 2+8+size)
	case string(data[:2]) != "Ed":
		return "", nil, fmt.Errorf("its algorithm is %q; want \"Ed\"", data[:2])
	}
	return string(data[2:10]), data[10:], nil
}

// unpack unpacks the package into the staging directory, where the sensor's
// directory is complete and on the disk when it returns nil.
func (u *updater) unpack(archive, name string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	contents, err := uncompressed(bufio.NewReader(f))
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	limited := &limitedReader{r: contents, left: u.maxUnpacked + maxEntries*2048 + maxPadding, limit: u.maxUnpacked}
	p := &unpacking{updater: u, name: name, left: u.maxUnpacked, seen: make(map[string]bool)}
	for r := tar.NewReader(limited); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
		if err := p.entry(h, r); err != nil {
			return fmt.Errorf("unpack %s: %w", cut(h.Name), err)
		}
	}
	if err := onlyZeros(limited); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	if limited.zeros < 2*512 {
		return errors.New("unpack: the archive is cut off")
	}
	if !p.seen[name] {
		return fmt.Errorf("unpack: no directory %s in the package", cut(name))
	}
	return syncDirs(append(p.dirs, u.at(stagingName)))
}

// uncompressed recognises bzip2, gzip and plain tar by what they begin with.
func uncompressed(r *bufio.Reader) (io.Reader, error) {
	magic, err := r.Peek(3)
	switch {
	case errors.Is(err, io.EOF):
		return nil, errors.New("the package is empty")
	case err != nil:
		return nil, err
	case string(magic) == "BZh":
		return bzip2.NewReader(r), nil
	case string(magic[:2]) == "\x1f\x8b":
		return gzip.NewReader(r)
	}
	return r, nil
}

// A limitedReader fails where there is more than it may read: a package of 785
// bytes can unpack to 1 GiB.
type limitedReader struct {
	r           io.Reader
	left, limit int64
	zeros       int // bytes of zeros at the end of what was read so far
}

func (l *limitedReader) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("unpacks to more than max_unpacked, %d bytes", l.limit)
	}
	n, err := l.r.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	if zeros := n - len(bytes.TrimRight(p[:n], "\x00")); zeros == n {
		l.zeros += n
	} else {
		l.zeros = zeros
	}
	return n, err
}

// onlyZeros reads to the end, where checksums are compared.
func onlyZeros(r io.Reader) error {
	buf := make([]byte, 4096)
	for read := 0; ; {
		n, err := r.Read(buf)
		if len(bytes.Trim(buf[:n], "\x00")) > 0 {
			return errors.New("something follows the archive's end")
		}
		if read += n; read > maxPadding {
			return errors.New("too many zeros follow the archive's end")
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// An unpacking is the state of one unpack.
type unpacking struct {
	*updater
	name    string // of the sensor
	entries int
	left    int64           // bytes that may still come
	seen    map[string]bool // the entries so far; false: a directory that was made for one in it
	dirs    []string
}

// entry unpacks one entry of the package, if it is one that belongs there.
func (p *unpacking) entry(h *tar.Header, r io.Reader) error {
	name, err := p.entryName(h)
	if err != nil || name == "." {
		return err
	}
	if err := p.count(); err != nil {
		return err
	}
	made, known := p.seen[name]
	if made || known && h.Typeflag != tar.TypeDir {
		return errors.New("twice in the package")
	}
	if err := p.parents(path.Dir(name)); err != nil {
		return err
	}
	p.seen[name] = true
	file := p.at(stagingName, filepath.FromSlash(name))
	mode := fs.FileMode(h.Mode) & 0o775 // no setuid, setgid, sticky, and not for everybody to write
	if h.Typeflag == tar.TypeDir {
		if known {
			return os.Chmod(file, mode|0o700)
		}
		return p.makeDir(file, mode|0o700)
	}
	if p.left -= h.Size; p.left < 0 {
		return fmt.Errorf("unpacks to more than max_unpacked, %d bytes", p.maxUnpacked)
	}
	if err := p.enoughSpace(filepath.Dir(file), h.Size); err != nil {
		return err
	}
	return p.writeFile(file, r, mode|0o400)
}

// entryName returns the name of an entry that may be unpacked: a plain path in
// the sensor's directory.
func (p *unpacking) entryName(h *tar.Header) (string, error) {
	name := strings.TrimPrefix(h.Name, "./")
	switch h.Typeflag {
	case tar.TypeReg:
	case tar.TypeDir:
		name = strings.TrimSuffix(name, "/")
		if name == "" || name == "." {
			return ".", nil // the directory that tar was called in
		}
	case tar.TypeSymlink, tar.TypeLink:
		return "", errors.New("links are refused")
	default:
		return "", fmt.Errorf("neither a file nor a directory (type %q)", h.Typeflag)
	}
	for record := range h.PAXRecords {
		if strings.HasPrefix(record, "GNU.sparse") {
			return "", errors.New("sparse files are refused")
		}
	}
	top, _, _ := strings.Cut(name, "/")
	switch {
	case strings.HasPrefix(name, "/"):
		return "", errors.New("an absolute path")
	case slices.Contains(strings.Split(name, "/"), ".."):
		return "", errors.New("path escapes the package")
	case len(name) > maxPath:
		return "", fmt.Errorf("a name of more than %d bytes", maxPath)
	case oneLine(name) != name || strings.ToValidUTF8(name, "") != name:
		return "", errors.New("a name with control characters")
	case path.Clean(name) != name:
		return "", errors.New("not a plain path")
	case top != p.name:
		return "", fmt.Errorf("not in the directory %s, the sensor that the package is for", cut(p.name))
	case name == p.name && h.Typeflag != tar.TypeDir:
		return "", errors.New("not a directory")
	}
	return name, nil
}

// parents makes the directories that have no entry of their own before what
// is in them.
func (p *unpacking) parents(dir string) error {
	if _, known := p.seen[dir]; known || dir == "." {
		return nil
	}
	if err := p.parents(path.Dir(dir)); err != nil {
		return err
	}
	if err := p.count(); err != nil {
		return err
	}
	p.seen[dir] = false
	return p.makeDir(p.at(stagingName, filepath.FromSlash(dir)), 0o755)
}

// count takes one of the entries that a package may have: also a directory
// that only the names of others tell of is one.
func (p *unpacking) count() error {
	if p.entries++; p.entries > maxEntries {
		return fmt.Errorf("more than %d entries", maxEntries)
	}
	return nil
}

func (p *unpacking) makeDir(file string, mode fs.FileMode) error {
	if err := p.enoughSpace(filepath.Dir(file), dirSpace); err != nil {
		return err
	}
	p.dirs = append(p.dirs, file)
	return p.mkdir(file, mode)
}

// checkVersion refuses an older version than the installed one and its
// backups: an old package, though signed, may be played again by whoever sits on
// the wire, also after a roll-back.
func (u *updater) checkVersion(name string) error {
	offered, err := readVersion(u.at(stagingName, name))
	if err != nil {
		return fmt.Errorf("version: %w", err)
	}
	backups, err := u.backups(name)
	if err != nil {
		return err
	}
	dirs := []string{u.at(name)}
	for _, backup := range backups {
		dirs = append(dirs, filepath.Join(u.backup, backup))
	}
	for _, dir := range dirs {
		known, err := readVersion(dir)
		switch {
		case err != nil || known == nil: // it says nothing that could be compared
		case offered == nil:
			return fmt.Errorf("version: none in the package; %s is known here", versionText(known))
		case slices.Compare(offered, known) < 0:
			return fmt.Errorf("version: %s is older than %s, which is known here", versionText(offered), versionText(known))
		}
	}
	return nil
}

// readVersion reads the file version of a sensor: decimal numbers with dots
// between them. Without the file it returns nil.
func readVersion(dir string) ([]uint64, error) {
	text, err := readSmall(filepath.Join(dir, "version"), maxVersion)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var version []uint64
	for _, part := range strings.Split(strings.TrimSpace(string(text)), ".") {
		n, err := strconv.ParseUint(part, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s is not a version such as 1.4.2", cut(string(text)))
		}
		version = append(version, n)
	}
	for len(version) > 1 && version[len(version)-1] == 0 { // 1.0 is 1
		version = version[:len(version)-1]
	}
	return version, nil
}

func versionText(version []uint64) string {
	var parts []string
	for _, n := range version {
		parts = append(parts, strconv.FormatUint(n, 10))
	}
	return strings.Join(parts, ".")
}

// nextMonitor asks the monitor where to move to, and returns a URL at which a
// monitor answers. The check turns what was answered into a URL, or refuses it.
func nextMonitor(ctx context.Context, c *client, check func(string) (*url.URL, error)) (*url.URL, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	v, err := c.call(ctx, "cmd_get_new_monitor_url", host)
	if err != nil {
		return nil, fmt.Errorf("cmd_get_new_monitor_url: %w", err)
	}
	text, ok := v.(string)
	if !ok {
		return nil, fmt.Errorf("cmd_get_new_monitor_url: got %s; want string", typeName(v))
	}
	u, err := check(text)
	switch {
	case err != nil:
		return nil, err
	case c.url.Scheme == "https" && u.Scheme != "https":
		return nil, fmt.Errorf("from https to %s, where everybody can read and change what is sent", u.Redacted())
	}
	next := newClient(u, c.timeout, c.tls)
	defer next.close()
	if v, err = next.call(ctx, "healthcheck"); err == nil && v != "OK" {
		err = fmt.Errorf("got %s", cut(fmt.Sprint(v)))
	}
	if err != nil {
		return nil, fmt.Errorf("healthcheck of %s: %w", u.Redacted(), err)
	}
	log.Printf("monitor %s: answers", u.Redacted())
	return u, nil
}
