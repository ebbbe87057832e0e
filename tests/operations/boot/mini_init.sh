#!/bin/sh
# The small system itself: counts its boots, looks for what it wrote before, writes more, and goes down as systemd does.
export PATH=/bin
exec > /dev/console 2>&1
mount -o remount,rw /
read -r count < /count
[ "$count" = 0 ] || (cd / && sha256sum -c -s /sums) || echo "MINI lost what was written"
count=$((count + 1))
head -c 1500000 /dev/urandom > "/written$count"
(cd / && sha256sum written*) > /sums
echo "$count" > /count
read -r root rest < /proc/mounts
echo "MINI boot=$count root=$(awk '$2 == "/" && $1 != "rootfs" { print $1 }' /proc/mounts)"
sync
if [ -x /run/initramfs/shutdown ]; then
    cd /run/initramfs
    for place in dev proc sys; do mount --move "/$place" "$place"; done
    pivot_root . oldroot
    exec /hvmgr/bin/busybox chroot . /shutdown poweroff < /dev/console > /dev/console 2>&1
fi
mount -o remount,ro /
echo "MINI off"
poweroff -f
