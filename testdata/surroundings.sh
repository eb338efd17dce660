#!/bin/sh
# A sensor that writes what it has of a terminal, which open files are called secret, and who it is.
has=
(: <>/dev/tty) 2>/dev/null && has=/dev/tty
for f in 0 1 2; do
	[ -t $f ] && has="$has $f"
done
for f in /proc/$$/fd/*; do
	case $(readlink "$f") in */secret) has="$has $f" ;; esac
done
echo "has [$has] $HOME $USER $LOGNAME" >>"$SEEN"
[ "$1" = hang ] && sleep 60
echo 1
