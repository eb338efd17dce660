package main

// The commands that change the agent itself: new code for a sensor, the way back from it, and the
// move to another monitor.
//
// A package is SENSOR.tar.bz2 (gzip and plain tar are taken, too) with one directory at the top, the
// sensor's name:
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
//	.sensors.picket-staging-4f2a...            the package, unpacked and tried here
//	sensors_backup/.disk_2010-03-07T21:24:33   the installed version, being linked or copied
//	sensors/.picket-new-disk                   the new version: this rename decides, recover does the rest
//	sensors_backup/disk_2010-03-07T21:24:33    the installed version, a backup from here on
//	sensors/.picket-gone-disk                  the installed version, out of the way; runs may still be in it
//	sensors/disk                               the new version
//
// recover removes every other hidden name: nothing in it is needed. It also finishes or undoes what
// older versions of picket left, .picket-lock and .picket-old-disk.
//
// Root may change sensors in a directory of another user, who can put links in the way at any moment.
// So everything is done in open directories, and no link is followed (see dir).

import (
	"archive/tar"
	"bufio"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"crypto/ed25519"
	"crypto/rand"
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
	maxEntries   = 1024            // files and directories in a package
	maxPath      = 255             // bytes of an entry's name
	maxNesting   = 200             // directories in each other: maxPath allows for 128
	maxPadding   = 1 << 20         // bytes behind the last entry: tar pads to 10 KiB
	maxKeyFile   = 4 << 10         // bytes of a public key or signature: they have about 150
	maxVersion   = 256             // bytes that are read of a file named version
	spaceReserve = 256 << 10       // bytes of a file system that an update leaves free
	dirSpace     = 4 << 10         // bytes that a directory is taken to need
	lockTime     = time.Minute     // to wait for another process that changes sensors
	otherRuns    = 5 * time.Second // to wait for runs of other processes in the replaced version

	lockName     = ".picket-lock"  // of older versions
	oldPrefix    = ".picket-old-"  // of older versions: the replaced version of a sensor
	gonePrefix   = ".picket-gone-" // to be removed
	backupLayout = "2006-01-02T15:04:05"
)

// An updater replaces sensors by packages, and by their backups.
//
// Whatever fails, power included, at every moment the old version or the new one is complete on the
// disk, and after recover it is in its place and nothing else is left.
type updater struct {
	sensors     *sensors
	backup      string // the directory of backups
	keys        string // a public key, or a directory of them; "" takes unsigned packages
	maxPackage  int64  // bytes
	maxUnpacked int64  // bytes
	keep        int    // backups of a sensor; 0 keeps all

	progress func(step string)       // is told what is being done
	step     func(what string) error // is asked before each change of the file system
}

// newUpdater returns an updater that reports to nobody.
func newUpdater(s *sensors, backup, keys string, maxPackage, maxUnpacked int64, keep int) *updater {
	return &updater{
		sensors: s, backup: backup, keys: keys, maxPackage: maxPackage, maxUnpacked: maxUnpacked, keep: keep,
		progress: func(string) {}, step: func(string) error { return nil },
	}
}

// A source provides a package and its signature. The signature is read only if a key is set.
type source struct {
	archive   func(ctx context.Context, to io.Writer) error
	signature func(ctx context.Context) ([]byte, error)
}

// fromMonitor provides the package of a sensor that the monitor has, up to a limit of bytes.
func fromMonitor(c *client, name string, limit int64) source {
	return source{
		archive: func(ctx context.Context, to io.Writer) error {
			return c.fetch(ctx, to, limit, "cmd_get_sensor_code", name)
		},
		signature: func(ctx context.Context) ([]byte, error) {
			v, err := c.call(ctx, "cmd_get_sensor_signature", name)
			if text, ok := v.(string); ok {
				return []byte(text), err
			}
			text, ok := v.([]byte)
			if err == nil && !ok {
				err = fmt.Errorf("got %s; want base64 or string", typeName(v))
			}
			return text, err
		},
	}
}

// fromFile provides a package that lies on the box, its signature beside it.
func fromFile(file string) source {
	return source{
		archive: func(_ context.Context, to io.Writer) error {
			f, err := openRegular(file)
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

// install fetches a package, verifies it, unpacks it, tries it and puts it in the place of the
// sensor. The installed version becomes a backup. An error means that nothing has changed.
func (u *updater) install(ctx context.Context, name string, from source) error {
	c := &change{updater: u, ctx: ctx, name: name, from: from}
	return c.make(c.fetch, c.verify, c.unpack, c.checkVersion, c.try, c.giveAway, c.replace)
}

// rollback puts the newest backup of a sensor in its place and removes it from the backups. The
// installed version becomes a backup. An error means that nothing has changed.
func (u *updater) rollback(ctx context.Context, name string) error {
	c, newest := &change{updater: u, ctx: ctx, name: name}, ""
	return c.make(func() error {
		backups, err := c.backupsOf(name, false)
		if err != nil {
			return err
		}
		if len(backups) == 0 {
			return errors.New("there is no backup")
		}
		c.progress("copy")
		newest = backups[len(backups)-1]
		return c.copy(c.backups, newest, c.staging, name)
	}, c.replace, func() error {
		c.tidy(c.removeBackup(newest))
		return nil
	})
}

// recover finishes or undoes what a power cut interrupted, and removes what is left. It may be
// interrupted itself and called again. It does not wait for the lock: the process that holds it has
// recovered already. If nothing was interrupted, it writes nothing.
func (u *updater) recover(ctx context.Context) error {
	entries, err := os.ReadDir(u.sensors.path)
	isHidden := func(e fs.DirEntry) bool { return strings.HasPrefix(e.Name(), ".picket-") }
	if err != nil || !exists(u.backup) && !slices.ContainsFunc(entries, isHidden) {
		return nil
	}
	c := &change{updater: u, ctx: ctx}
	defer c.close()
	if err := c.begin(0); errors.Is(err, context.DeadlineExceeded) {
		return nil
	} else if err != nil {
		return err
	}
	return errors.Join(c.settle(), c.prune())
}

// ownerWarning returns a line for the log, or "" if there is nothing to warn of. It warns an agent
// that runs as root if the sensors belong to another user, but the backups to root. tar leaves them
// so when it keeps the user number of whoever packed the sensors.
func (u *updater) ownerWarning() string {
	sensors, err := os.Stat(u.sensors.path)
	backups, err2 := os.Stat(u.backup)
	if err != nil || err2 != nil || os.Geteuid() != 0 || ownerOf(sensors).Uid == 0 || ownerOf(backups).Uid != 0 {
		return ""
	}
	uid, gid := ownerOf(sensors).Uid, ownerOf(sensors).Gid
	return fmt.Sprintf("%s belongs to user %d, who can change what the agent runs, but %s to root: "+
		"give both to root with chown -R 0:0 %s, or both to him with chown -R %d:%d %s",
		u.sensors.path, uid, u.backup, u.sensors.path, uid, gid, u.backup)
}

// A change is the state of one change of a sensor, or of recovery. Its directories are open, and
// locked for all other changes.
type change struct {
	*updater
	ctx       context.Context
	name      string // of the sensor; "" in recovery
	from      source
	installed dir             // the sensors
	owner     *syscall.Stat_t // of that directory
	backups   dir
	beside    dir // the directory that holds the one of the sensors
	staging   dir
	archive   *os.File // the package
	tooLate   bool     // to call it off: the installed version is half removed
	keepGone  bool     // runs are still in the version that was replaced
}

// make runs the steps of a change, up to the first one that fails, while no other process changes
// sensors. Before, it settles what an interrupted change left. Afterwards it removes all that is
// left of this one.
func (c *change) make(steps ...func() error) error {
	defer c.close()
	if err := c.begin(lockTime); err != nil {
		return err
	}
	err := c.settle()
	if err != nil && c.isUnsettled() {
		return fmt.Errorf("an earlier change is not settled: %w", err)
	}
	c.tidy(err)
	err = c.stage()
	for _, step := range steps {
		if err == nil {
			err = step()
		}
	}
	if err == nil {
		c.tidy(c.prune())
	}
	c.tidy(c.settle())
	return err
}

// tidy logs an error that does not decide whether the change was made. recover will try again what
// failed.
func (c *change) tidy(err error) {
	if err != nil {
		log.Printf(warning+"tidy sensors: %v", err)
	}
}

// begin opens the directories of sensors and of backups, and makes those that are missing. It locks
// the backups, because no other user can do that: none can read them. If another process that changes
// sensors holds the lock for longer than wait, the error wraps context.DeadlineExceeded.
func (c *change) begin(wait time.Duration) (err error) {
	if c.installed, err = c.openBase(c.sensors.path, 0o755); err != nil {
		return err
	}
	c.beside = c.installed
	if real, err := filepath.EvalSymlinks(c.sensors.path); err == nil {
		if f, err := os.OpenFile(filepath.Dir(real), syscall.O_DIRECTORY, 0); err == nil {
			c.beside = dir{File: f, step: c.step}
		}
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
	if mode := backups.Mode().Perm(); isNew {
		err = chown(c.backups.File, c.owner)
	} else if c.name != "" && mode&0o077 != 0 {
		c.backups.Chmod(mode &^ 0o077) // older versions made it open; only its owner can close it
	}
	if err != nil {
		return err
	}
	if err := flockWithin(c.ctx, c.backups.File, syscall.LOCK_EX, wait); err != nil {
		return fmt.Errorf("lock %s: another process is changing the sensors: %w", c.backup, err)
	}
	return nil
}

// close closes the directories and the package, and so unlocks the backups. Closing what was never
// opened does nothing.
func (c *change) close() {
	for _, f := range []*os.File{c.installed.File, c.backups.File, c.beside.File, c.staging.File, c.archive} {
		f.Close()
	}
}

// openBase opens the directory of sensors or of backups. If it is missing, openBase makes it, with
// this mode whatever the umask, and the directories above it with mode 755. Root follows no link that
// another user could have made.
func (c *change) openBase(path string, mode fs.FileMode) (dir, error) {
	flags := syscall.O_DIRECTORY
	if info, err := os.Stat(filepath.Dir(path)); err == nil && os.Geteuid() == 0 &&
		(ownerOf(info).Uid != 0 || info.Mode().Perm()&0o002 != 0) {
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

// ownerOf returns the user and the group that a file belongs to, among what else the system knows.
func ownerOf(info fs.FileInfo) *syscall.Stat_t { return info.Sys().(*syscall.Stat_t) }

// chown gives an open file to an owner, unless that is nil. Only root can do so; for other users
// chown does nothing, as they change only what is theirs.
func chown(f *os.File, owner *syscall.Stat_t) error {
	if owner == nil || os.Geteuid() != 0 {
		return nil
	}
	return f.Chown(int(owner.Uid), int(owner.Gid))
}

// stage makes the staging directory, with a name that nobody can guess. It lies beside the
// directory of sensors, so that the owner of that cannot exchange it. If nothing can be renamed from
// there into the directory of sensors, for instance because that is a mount, it lies among them.
func (c *change) stage() (err error) {
	random := make([]byte, 8)
	if _, err := rand.Read(random); err != nil {
		return err
	}
	name := fmt.Sprintf("%s%x", c.stagingPrefix(), random)
	if c.staging, err = c.beside.mkdir(name, 0o711); err == nil {
		probe, err := c.staging.mkdir(name, 0o700) // two mounts may be of one device: only trying tells
		probe.Close()
		if err == nil && c.staging.rename(name, c.installed, name) == nil {
			return c.installed.remove(name)
		}
		c.staging.Close()
	}
	c.staging, err = c.installed.mkdir(name, 0o711)
	return err
}

// stagingPrefix begins the name of each staging directory. It holds the name of the directory of
// sensors, because another one may lie beside it, with changes of its own.
func (c *change) stagingPrefix() string {
	return "." + filepath.Base(c.sensors.path) + ".picket-staging-"
}

// try runs the staged version once, with the help argument. It must exit 0 within the sensors'
// time-out.
func (c *change) try() error {
	c.progress("try")
	s, dir := c.sensors.of(c.name), c.staging.path(c.name)
	switch o := s.runIn(c.ctx, dir, c.stagingPrefix()+c.name, []string{s.help}, nil); o.code {
	case 0:
		return nil
	case codeNotFound:
		return fmt.Errorf("it holds no executable %s", s.executable)
	default:
		return fmt.Errorf("try %s %s: %s", s.executable, s.help, o)
	}
}

// giveAway gives the staged version to the owner of the directory of sensors, so that an agent that
// runs as him can replace it. It works from the inside out: what he could already exchange is not
// touched any more.
func (c *change) giveAway() error {
	if os.Geteuid() != 0 || c.owner.Uid == 0 {
		return nil
	}
	return c.staging.each(c.name, func(f *os.File) error { return errors.Join(chown(f, c.owner), syncFile(f)) })
}

// replace puts the staged version in the place of the sensor, and the installed one among the
// backups. One rename decides: before it nothing has changed, after it settle can do the rest at
// any time. If the rest fails twice, the change is called off, as long as the installed version is
// whole.
func (c *change) replace() error {
	c.progress("swap")
	backup, newName, isNew := "", newPrefix+c.name, !c.installed.has(c.name)
	var err error
	if !isNew {
		backup, err = c.backUp(c.name, c.name)
	}
	if err == nil {
		err = c.staging.rename(c.name, c.installed, newName)
	}
	if err != nil && !c.installed.has(newName) {
		return err
	}
	err = c.finish(c.name)
	if err != nil { // perhaps what failed once works now
		err = c.finish(c.name)
	}
	if err != nil && c.installed.has(newName) {
		if !c.tooLate {
			c.tidy(c.undo(backup))
		}
		return err
	}
	c.tidy(err) // of the last sync: the new version is in its place, as all can see
	c.keepGone = !isNew && !c.awaitRuns()
	return nil
}

// undo takes back a change that was decided but could not be finished. The backup, "" if there was
// no installed version, is hidden again only when nothing can finish the change any more.
func (c *change) undo(backup string) error {
	if backup != "" && !c.installed.has(c.name) {
		if err := c.installed.rename(gonePrefix+c.name, c.installed, c.name); err != nil {
			return err
		}
	}
	if err := c.discard(newPrefix+c.name, c.name); err != nil || backup == "" || !c.backups.has(backup) {
		return err
	}
	return c.backups.rename(backup, c.backups, "."+backup)
}

// backUp makes a hidden backup of a file among the sensors that is a version of this sensor, and
// returns the name that it gets when it is published. The name holds the local time. If the clock is
// behind the newest backup, it holds the second after that, so that the order of names is that of age.
func (c *change) backUp(name, file string) (backup string, err error) {
	backups, err := c.backupsOf(name, false)
	if err != nil {
		return "", err
	}
	stamp := time.Now().Format(backupLayout)
	if n := len(backups); n > 0 {
		if newest := strings.TrimPrefix(backups[n-1], name+"_"); newest >= stamp {
			t, _ := time.Parse(backupLayout, newest) // parseBackup has checked it
			stamp = t.Add(time.Second).Format(backupLayout)
		}
	}
	backup = name + "_" + stamp
	if err := c.copy(c.installed, file, c.backups, "."+backup); err != nil {
		return "", err
	}
	return backup, syncFile(c.backups.File)
}

// finish publishes the backup of a sensor and puts .picket-new-NAME in its place. For an instant
// there is no sensor, and new runs wait. If finish was interrupted or failed, it can be called again.
func (c *change) finish(name string) error {
	if !c.installed.has(newPrefix + name) {
		return syncFile(c.installed.File) // the rename below was the last step
	}
	made, err := c.backupsOf(name, true)
	if err != nil {
		return err
	}
	for _, backup := range made {
		if err := c.backups.rename(backup, c.backups, backup[1:]); err != nil {
			return err
		}
	}
	if c.installed.has(name) {
		err = c.discard(name, name)
	}
	if errors.Is(err, syscall.EXDEV) { // a directory in the lower layer of an overlay file system
		c.tooLate = true
		if d, err := c.installed.open(name, syscall.O_DIRECTORY); err == nil {
			os.Remove(d.at(c.sensors.executable)) // first, so that no run begins in half a sensor
			d.Close()
		}
		err = c.installed.remove(name)
	}
	if err != nil {
		return err
	}
	return c.installed.rename(newPrefix+name, c.installed, name)
}

// awaitRuns waits until no run is in the version that was replaced, because that is removed next. It
// waits for runs of other processes for otherRuns at most, and reports false if the change has to end
// before the runs do.
func (c *change) awaitRuns() bool {
	select {
	case <-c.sensors.retire(c.name):
	case <-c.ctx.Done():
		return false
	}
	for end := time.Now().Add(otherRuns); c.inUse(gonePrefix+c.name) && time.Now().Before(end); {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-c.ctx.Done():
			return false
		}
	}
	return true
}

// inUse reports whether any process works in a directory among the sensors. A run of the agent does
// so while picket install changes its sensor. Without /proc it reports false.
func (c *change) inUse(name string) bool {
	sensors, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", c.installed.Fd()))
	links, _ := filepath.Glob("/proc/[0-9]*/cwd")
	return err == nil && slices.ContainsFunc(links, func(link string) bool {
		cwd, _ := os.Readlink(link) // a stat could hang on a dead disk or network
		return strings.HasPrefix(cwd+"/", filepath.Join(sensors, name)+"/")
	})
}

// settle finishes the changes that were decided, and removes what is left of all others. If that
// fails for one sensor, settle goes on with the next.
//
// Older versions of picket left .picket-lock, and another name decided: a new version counts there
// once the installed one was renamed to .picket-old-NAME. What they hid among the backups may not be
// complete.
func (c *change) settle() error {
	files, err := c.installed.names()
	isOlder := slices.Contains(files, lockName)
	if isOlder {
		err = errors.Join(err, c.removeHiddenBackups(true))
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range files { // in order: the new version of a sensor before the old one
		if name, ok := versionOf(file, newPrefix); ok {
			if isOlder && c.installed.has(name) && !c.installed.has(oldPrefix+name) {
				errs = append(errs, c.discard(file, name))
			} else {
				errs = append(errs, c.finish(name))
			}
		}
		if name, ok := versionOf(file, oldPrefix); ok && !c.installed.has(newPrefix+name) {
			errs = append(errs, c.settleOld(name))
		}
	}
	errs = append(errs, c.removeHiddenBackups(false), c.removeRubbish())
	if isOlder && errors.Join(errs...) == nil {
		return c.installed.remove(lockName)
	}
	return errors.Join(errs...)
}

// settleOld makes a backup of the version that an older picket moved out of the way, or puts it back
// if nothing is in its place.
func (c *change) settleOld(name string) error {
	old := oldPrefix + name
	if !c.installed.has(name) {
		return c.installed.rename(old, c.installed, name)
	}
	backup, err := c.backUp(name, old)
	if err == nil {
		err = c.backups.rename("."+backup, c.backups, backup)
	}
	if err == nil {
		err = c.discard(old, name)
	}
	return err
}

// discard renames one version of a sensor to .picket-gone-NAME, and removeRubbish removes it later:
// a version that is half removed must not be taken for a whole one.
func (c *change) discard(file, name string) error {
	if err := c.installed.remove(gonePrefix + name); err != nil {
		return err
	}
	return c.installed.rename(file, c.installed, gonePrefix+name)
}

// versionOf returns the name of a sensor if the file is a version of it, a hidden name with this
// prefix.
func versionOf(file, prefix string) (name string, ok bool) {
	name, ok = strings.CutPrefix(file, prefix)
	_, err := sensorName(name) // above all it is not ".."
	return name, ok && err == nil
}

// removeRubbish removes staging directories and all hidden names of picket among the sensors, except
// those of versions that settle still needs and a directory that runs are still in.
func (c *change) removeRubbish() error {
	isStaging := func(file string) bool { return strings.HasPrefix(file, c.stagingPrefix()) }
	return errors.Join(c.beside.removeWhere(isStaging), c.installed.removeWhere(func(file string) bool {
		_, isNew := versionOf(file, newPrefix)
		_, isOld := versionOf(file, oldPrefix)
		keep := isNew || isOld || file == lockName || c.keepGone && file == gonePrefix+c.name
		return !keep && (strings.HasPrefix(file, ".picket-") || isStaging(file))
	}))
}

// removeHiddenBackups removes the backups that are half made or half removed. A backup that finish
// will publish stays, unless all are to be removed.
func (c *change) removeHiddenBackups(all bool) error {
	return c.backups.removeWhere(func(file string) bool {
		name, isHidden, ok := parseBackup(file)
		return ok && isHidden && (all || !c.installed.has(newPrefix+name))
	})
}

// isUnsettled reports whether something is left of an earlier change of this sensor.
func (c *change) isUnsettled() bool {
	made, err := c.backupsOf(c.name, true)
	return err != nil || len(made) > 0 ||
		slices.ContainsFunc([]string{newPrefix, oldPrefix, gonePrefix}, func(prefix string) bool {
			return c.installed.has(prefix + c.name)
		})
}

// backupsOf lists the published or the hidden backups of a sensor, the oldest first.
func (c *change) backupsOf(name string, hidden bool) ([]string, error) {
	files, err := c.backups.names()
	return slices.DeleteFunc(files, func(file string) bool {
		of, isHidden, ok := parseBackup(file)
		return !ok || of != name || isHidden != hidden
	}), err
}

// parseBackup splits the name of a backup. It returns the name of its sensor and whether the backup
// is hidden, because it is being made or removed. Of any other name it reports that it is not ok.
func parseBackup(file string) (name string, isHidden, ok bool) {
	file, isHidden = strings.CutPrefix(file, ".")
	i := len(file) - len("_"+backupLayout)
	if i < 1 || file[i] != '_' {
		return "", false, false
	}
	_, err := time.Parse(backupLayout, file[i+1:])
	return file[:i], isHidden, err == nil
}

// prune removes the oldest backups of each sensor, so that keep of them remain; 0 removes none.
func (c *change) prune() error {
	files, err := c.backups.names()
	errs, count := []error{err}, make(map[string]int)
	for i := len(files) - 1; i >= 0 && c.keep > 0; i-- {
		name, isHidden, ok := parseBackup(files[i])
		if !ok || isHidden {
			continue
		}
		if count[name]++; count[name] > c.keep {
			errs = append(errs, c.removeBackup(files[i]))
		}
	}
	return errors.Join(errs...)
}

// removeBackup removes a backup. It hides the backup first: nobody can take it for one while half of
// it is removed.
func (c *change) removeBackup(backup string) error {
	if err := c.backups.rename(backup, c.backups, "."+backup); err != nil {
		return err
	}
	return c.backups.remove("." + backup)
}

// copy copies a sensor, or part of one, with its owner. When it returns nil, the copy is on the disk.
// It links files where that is possible, which takes no space, and copies links as they are.
func (c *change) copy(from dir, name string, to dir, as string) error {
	info, err := os.Lstat(from.at(name))
	if err != nil {
		return err
	}
	link := func(string) error { return os.Link(from.at(name), to.at(as)) }
	switch kind := info.Mode().Type(); {
	case kind.IsDir():
	case kind == fs.ModeSymlink: // of an administrator's own sensor
		target, err := os.Readlink(from.at(name))
		if err != nil {
			return err
		}
		return to.do("link", as, func(path string) error { return os.Symlink(target, path) })
	case !kind.IsRegular():
		return fmt.Errorf("copy %s: neither a file nor a directory", from.path(name))
	case to.do("link", as, link) == nil:
		return nil
	}
	f, err := from.open(name, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil {
		return err
	}
	if info.IsDir() {
		return c.copyDir(f, info, to, as)
	}
	if err := to.enoughSpace(info.Size()); err != nil {
		return err
	}
	// A pipe that somebody has put in its place has the size 0, so that it is not read.
	return to.write(as, io.LimitReader(f, info.Size()), info.Mode().Perm(), ownerOf(info))
}

// copyDir copies an open directory, as copy does.
func (c *change) copyDir(from dir, info fs.FileInfo, to dir, as string) error {
	target, err := to.mkdir(as, info.Mode().Perm()|0o700)
	if err != nil {
		return err
	}
	defer target.Close()
	names, err := from.names()
	for _, name := range names {
		if err == nil {
			err = c.copy(from, name, target, name)
		}
	}
	if err == nil {
		err = chown(target.File, ownerOf(info)) // last: until here he cannot change it
	}
	if err == nil {
		err = syncFile(target.File)
	}
	return err
}

// A dir is an open directory. All its methods work in that directory and nowhere else, whatever its
// owner exchanges meanwhile: names are single path elements, and no link is followed. Before each
// change they ask updater.step.
type dir struct {
	*os.File
	depth int // of directories in each other, from one that was opened by its path
	step  func(what string) error
}

// at returns a path that leads to a name in this very directory, wherever that was moved to. Only
// calls that do not follow a link at its end may use it. Without /proc it is the usual path.
func (d dir) at(name string) string {
	if open := fmt.Sprintf("/proc/self/fd/%d", d.Fd()); exists(open) {
		return filepath.Join(open, name)
	}
	return d.path(name)
}

// has reports whether there is anything with this name.
func (d dir) has(name string) bool { return exists(d.at(name)) }

// names lists the directory, in the order of bytes.
func (d dir) names() ([]string, error) {
	if _, err := d.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	names, err := d.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// path returns the usual path of a name, for messages and for children.
func (d dir) path(name string) string { return filepath.Join(d.Name(), name) }

// open opens a file or directory for reading, or with these flags in addition. It does not follow a
// link, and does not wait for the other end of a pipe.
func (d dir) open(name string, flags int) (dir, error) {
	if d.depth == maxNesting {
		return dir{}, fmt.Errorf("%s: more than %d directories in each other", d.Name(), maxNesting)
	}
	flags |= syscall.O_NOFOLLOW | syscall.O_NONBLOCK | syscall.O_CLOEXEC
	fd, err := syscall.Openat(int(d.Fd()), name, flags, 0o600)
	if err != nil {
		return dir{}, &os.PathError{Op: "open", Path: d.path(name), Err: err}
	}
	return dir{os.NewFile(uintptr(fd), d.path(name)), d.depth + 1, d.step}, nil
}

// do asks step and then makes a change at the path of a name. Its error shows the usual path, not
// the one through /proc.
func (d dir) do(what, name string, change func(path string) error) error {
	if err := d.step(what + " " + d.path(name)); err != nil {
		return err
	}
	if err := change(d.at(name)); err != nil {
		return &os.PathError{Op: what, Path: d.path(name), Err: errors.Unwrap(err)}
	}
	return nil
}

// rename renames a file or directory. When it returns nil, the new name is on the disk.
func (d dir) rename(name string, to dir, newName string) error {
	err := d.do("rename", name, func(path string) error { return os.Rename(path, to.at(newName)) })
	if err != nil {
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
	if err == nil {
		var names []string
		if names, err = made.names(); len(names) > 0 || int(ownerOf(info).Uid) != os.Geteuid() {
			err = fmt.Errorf("mkdir %s: somebody has exchanged it", made.Name())
		}
	}
	if err == nil {
		err = made.Chmod(mode)
	}
	if err != nil {
		made.Close()
	}
	return made, err
}

// create makes a file and opens it for reading and writing. It fails if the name exists.
func (d dir) create(name string) (dir, error) {
	if err := d.step("create " + d.path(name)); err != nil {
		return dir{}, err
	}
	return d.open(name, syscall.O_RDWR|syscall.O_CREAT|syscall.O_EXCL)
}

// write makes a file with this content and mode, and syncs it. Root gives it to the owner, unless
// that is nil.
func (d dir) write(name string, from io.Reader, mode fs.FileMode, owner *syscall.Stat_t) error {
	f, err := d.create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, from); err != nil {
		return err
	}
	if err := d.step("sync " + f.Name()); err != nil {
		return err
	}
	return errors.Join(chown(f.File, owner), f.Chmod(mode), f.Sync())
}

// each calls visit for a file, or for all that is in a directory, however deep, and then for the
// directory itself. It skips links, which a trial may have made.
func (d dir) each(name string, visit func(*os.File) error) error {
	f, err := d.open(name, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	names, err := f.names()
	if err != nil && !errors.Is(err, syscall.ENOTDIR) {
		return err
	}
	for _, name := range names {
		if err := f.each(name, visit); err != nil && !errors.Is(err, syscall.ELOOP) {
			return err
		}
	}
	return visit(f.File)
}

// remove removes a name, with all that is in it. A name that does not exist is no error.
func (d dir) remove(name string) error {
	if err := d.step("remove " + d.path(name)); err != nil {
		return err
	}
	return d.removeAll(name)
}

// removeWhere removes all names for which isRubbish reports true. If one cannot be removed, it goes
// on with the next.
func (d dir) removeWhere(isRubbish func(name string) bool) error {
	names, err := d.names()
	errs := []error{err}
	for _, name := range names {
		if isRubbish(name) {
			errs = append(errs, d.remove(name))
		}
	}
	return errors.Join(errs...)
}

// removeAll is remove without asking step. It enters a directory only after opening it, so that it
// follows no link.
func (d dir) removeAll(name string) error {
	err := os.Remove(d.at(name))
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if os.Geteuid() != 0 { // a trial may have left a directory that its owner cannot enter; root can
		os.Chmod(d.at(name), 0o700)
	}
	if inner, err := d.open(name, syscall.O_DIRECTORY); err == nil {
		defer inner.Close()
		names, _ := inner.names()
		for _, name := range names {
			if err := inner.removeAll(name); err != nil {
				return err
			}
		}
		if os.Remove(d.at(name)) == nil {
			return nil
		}
	}
	return &os.PathError{Op: "remove", Path: d.path(name), Err: errors.Unwrap(err)}
}

// enoughSpace returns an error if size more bytes would not leave spaceReserve of the file system
// free, or if hardly another file can be made.
func (d dir) enoughSpace(size int64) error {
	var s syscall.Statfs_t
	if err := syscall.Fstatfs(int(d.Fd()), &s); err != nil {
		return &os.PathError{Op: "statfs", Path: d.Name(), Err: err}
	}
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

// fetch writes the package to the staging directory, and no more of it than is allowed.
func (c *change) fetch() error {
	f, err := c.staging.create("package")
	if err != nil {
		return err
	}
	c.archive = f.File
	written := int64(0)
	to := writerFunc(func(p []byte) (int, error) {
		if written += int64(len(p)); written > c.maxPackage {
			return 0, fmt.Errorf("larger than max_package, %d bytes", c.maxPackage)
		}
		if err := c.staging.enoughSpace(int64(len(p))); err != nil {
			return 0, err
		}
		c.progress(fmt.Sprintf("fetch %d bytes", written))
		return f.Write(p)
	})
	if err := c.from.archive(c.ctx, to); err != nil {
		return fmt.Errorf("fetch: %w", err)
	}
	return nil
}

// verify checks the signature of the package, before any byte of it is parsed. If no key is set, it
// takes every package.
func (c *change) verify() error {
	if c.keys == "" {
		return nil
	}
	c.progress("verify")
	if err := c.checkSignature(); err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	return nil
}

// checkSignature checks the signature of the package with the key whose number it names.
func (c *change) checkSignature() error {
	keys, err := readKeys(c.keys)
	if err != nil {
		return fmt.Errorf("public key: %w", err)
	}
	text, err := c.from.signature(c.ctx)
	if err != nil {
		return fmt.Errorf("signature: %w", err)
	}
	number, signature, err := parseSignify(text, ed25519.SignatureSize)
	if err != nil {
		return fmt.Errorf("signature: %w", err)
	}
	key, ok := keys[number]
	if !ok {
		return fmt.Errorf("signed with key %x, which is not known", number)
	}
	info, err := c.archive.Stat()
	if err != nil {
		return err
	}
	var message []byte
	if info.Size() > 0 { // mapped, the package takes no memory of the heap
		message, err = syscall.Mmap(int(c.archive.Fd()), 0, int(info.Size()), syscall.PROT_READ, syscall.MAP_SHARED)
		if err != nil {
			return &os.PathError{Op: "mmap", Path: c.archive.Name(), Err: err}
		}
		defer syscall.Munmap(message)
	}
	if !ed25519.Verify(key, message, signature) {
		return errors.New("the signature does not fit the package")
	}
	return nil
}

// readKeys reads a public key, or each NAME.pub of a directory. It returns at least one, by number.
func readKeys(file string) (map[string]ed25519.PublicKey, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	dir, names := filepath.Dir(file), []string{filepath.Base(file)}
	if info.IsDir() {
		dir = file
		if names, err = fs.Glob(os.DirFS(dir), "*.pub"); err != nil || len(names) == 0 {
			return nil, fmt.Errorf("no *.pub in %s", dir)
		}
	}
	keys := make(map[string]ed25519.PublicKey)
	for _, name := range names {
		text, err := readSmall(filepath.Join(dir, name), maxKeyFile)
		if err != nil {
			return nil, err
		}
		number, key, err := parseSignify(text, ed25519.PublicKeySize)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(dir, name), err)
		}
		keys[number] = key
	}
	return keys, nil
}

// parseSignify reads a key or a signature of signify: a line of comment, and a line of base64 with
// "Ed", 8 bytes of key number and size bytes of data. Nothing else may be in it.
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

// unpack unpacks the package into the staging directory. When it returns nil, the directory of the
// sensor is complete there and on the disk. An archive that is cut off, even between two entries, is
// an error; what follows the end of an archive is ignored.
func (c *change) unpack() error {
	c.progress("unpack")
	if _, err := c.archive.Seek(0, io.SeekStart); err != nil {
		return err
	}
	contents, err := uncompressed(bufio.NewReader(c.archive))
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	// Besides its content an entry takes up to 2 KiB: header, long name, padding.
	most := c.maxUnpacked + maxEntries*2048 + maxPadding
	limited := &limitedReader{r: contents, left: most, limit: c.maxUnpacked}
	p := &unpacking{change: c, left: c.maxUnpacked, seen: make(map[string]bool)}
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
	if limited.ended { // before the two blocks of zeros that end an archive
		return errors.New("unpack: the archive is cut off")
	}
	if _, err := io.Copy(io.Discard, limited); err != nil { // at the very end checksums are compared
		return fmt.Errorf("unpack: %w", err)
	}
	err = c.staging.each(c.name, syncFile)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unpack: no directory %s in the package", cut(c.name))
	}
	return err
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

// A limitedReader fails when more comes than it may read: a package of 785 bytes can unpack to 1 GiB.
type limitedReader struct {
	r           io.Reader
	left, limit int64
	ended       bool // the latest Read found nothing more
}

func (l *limitedReader) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("unpacks to more than max_unpacked, %d bytes", l.limit)
	}
	n, err := l.r.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	l.ended = n == 0 && errors.Is(err, io.EOF)
	return n, err
}

// An unpacking is the state of one unpack.
type unpacking struct {
	*change
	left int64           // bytes of content that may still come
	seen map[string]bool // the names so far; false: a directory without an entry of its own until now
}

// entry unpacks one entry of the package, or returns why it does not belong there.
func (p *unpacking) entry(h *tar.Header, r io.Reader) error {
	name, err := p.entryName(h)
	if err != nil || name == "." {
		return err
	}
	own, known := p.seen[name]
	if own || known && h.Typeflag != tar.TypeDir {
		return errors.New("twice in the package")
	}
	mode := fs.FileMode(h.Mode) & 0o775 // no setuid, setgid, sticky, and not for everybody to write
	if h.Typeflag == tar.TypeDir {
		d, err := p.directory(name)
		if err != nil {
			return err
		}
		defer d.Close()
		p.seen[name] = true
		return d.Chmod(mode | 0o700)
	}
	parent, err := p.directory(path.Dir(name))
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := p.count(name, h.Size, parent); err != nil {
		return err
	}
	p.seen[name] = true
	return parent.write(path.Base(name), r, mode|0o400, nil)
}

// entryName returns the name of an entry that may be unpacked: a plain path in the sensor's
// directory.
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

// directory opens a directory of the package. If it is missing, directory makes it with mode 755,
// which its own entry may change later.
func (p *unpacking) directory(name string) (dir, error) {
	if name == "." {
		return p.staging.open(".", syscall.O_DIRECTORY)
	}
	parent, err := p.directory(path.Dir(name))
	if err != nil {
		return dir{}, err
	}
	defer parent.Close()
	if _, known := p.seen[name]; known {
		return parent.open(path.Base(name), syscall.O_DIRECTORY)
	}
	if err := p.count(name, 0, parent); err != nil {
		return dir{}, err
	}
	return parent.mkdir(path.Base(name), 0o755)
}

// count counts a file or directory of the package, including one that appears only in the path of a
// file. It fails if there are too many, or if size bytes of content more are too much.
func (p *unpacking) count(name string, size int64, in dir) error {
	if p.seen[name] = false; len(p.seen) > maxEntries {
		return fmt.Errorf("more than %d entries", maxEntries)
	}
	if p.left -= size; p.left < 0 {
		return fmt.Errorf("unpacks to more than max_unpacked, %d bytes", p.maxUnpacked)
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
	backups, err := c.backupsOf(c.name, false)
	newest, _ := c.installed.version(c.name) // without a valid one there is nothing to compare
	for _, backup := range backups {
		if v, _ := c.backups.version(backup); slices.Compare(v, newest) > 0 {
			newest = v
		}
	}
	switch {
	case err != nil:
		return err
	case slices.Compare(offered, newest) >= 0:
		return nil
	case offered == nil:
		return fmt.Errorf("version: none in the package; %s is known here", versionText(newest))
	}
	return fmt.Errorf("version: %s is older than %s, which is known here",
		versionText(offered), versionText(newest))
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
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	// The size of a pipe is 0, so that it is not read: that could take for ever.
	text, err := io.ReadAll(io.LimitReader(f, min(info.Size(), maxVersion+1)))
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

// versionText writes a version with dots.
func versionText(version []uint64) string {
	return strings.ReplaceAll(strings.Trim(fmt.Sprint(version), "[]"), " ", ".")
}

// nextMonitor asks the monitor where to move to, and returns that URL if a monitor answers there.
// The check turns the answer into a URL, or refuses it. A move from https to http is refused.
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
		return nil, fmt.Errorf("from https to %s, where everybody can read and change what is sent", masked(u.String()))
	}
	next := newClient(u, c.timeout, c.tls)
	defer next.close()
	if v, err = next.call(ctx, "healthcheck"); err == nil && v != "OK" {
		err = fmt.Errorf("got %s", cut(fmt.Sprint(v)))
	}
	if err != nil {
		return nil, fmt.Errorf("healthcheck of %s: %w", masked(u.String()), err)
	}
	log.Printf("monitor %s: answers", masked(u.String()))
	return u, nil
}
