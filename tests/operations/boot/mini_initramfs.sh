#!/bin/busybox sh
# The initramfs of the small system that tests boot natively: what Debian's initramfs-tools does, as far as it matters.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /run /root /bin /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
while read -r name; do insmod "/modules/$name"; done < /modules/ORDER
for conf in conf/conf.d/*; do [ -f "$conf" ] && . "$conf"; done
for word in $(cat /proc/cmdline); do
    case $word in root=*) root=${word#root=} ;; esac
done
run_scripts() { [ -f "$1/ORDER" ] && . "$1/ORDER"; }
run_scripts /scripts/local-top
case $root in UUID=*) root=$(findfs "$root") ;; esac
tries=0
until [ -b "$root" ] || [ $tries -ge 100 ]; do usleep 100000; tries=$((tries + 1)); done
mount -t ext4 "$root" /root || { echo "MINI no root"; poweroff -f; }
run_scripts /scripts/local-bottom
for place in proc sys dev run; do mount --move "/$place" "/root/$place"; done
exec switch_root /root /sbin/init
