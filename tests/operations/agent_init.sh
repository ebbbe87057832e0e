#!/bin/busybox sh
# Before the counting guest's own init (/count): mounts the ext4 of /dev/vda1, starts Debian's qemu-guest-agent on its
# port, and writes to that file system all the time. Both go on beside the counting.

export PATH=/bin
/bin/busybox mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for group in virtio port; do
    while read -r name; do insmod "/modules/$name.ko"; done < "/modules/$group"
done
mount -t ext4 /dev/vda1 /files

path=''
find_port() { # the kernel hears of ports, and of their names, some time after it has the driver
    for port in /sys/class/virtio-ports/*; do
        read -r name < "$port/name" && [ "$name" = org.qemu.guest_agent.0 ] && path=/dev/${port##*/}
    done
    [ -e "$path" ]
}
{
    until find_port 2> /dev/null; do sleep 0.05; done
    exec qemu-ga --method virtio-serial --path "$path" --statedir /agent --pidfile /agent/pid --logfile /agent/log
} &

number=0
while :; do # a file system at rest lets it wait here
    number=$((number + 1))
    echo "$number" > /files/number
    sync
    sleep 0.05
done &
exec /bin/busybox sh /count 2> /dev/null # it loads and mounts again what is there
