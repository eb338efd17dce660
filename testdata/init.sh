# Runs busybox's init with the directory $1 as its root, in which all is read-only but var.
set -e
cd "$1"
mount --bind . .
cd "$1"
chroot . /bin/busybox --install -s /bin
mount --bind var var
mount -o remount,bind,ro .
mount --bind /dev/null dev/null
mount -t proc none proc
exec chroot . /bin/busybox env -i /bin/init
