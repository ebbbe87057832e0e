#!/bin/busybox sh
# The first and only process of the counting guest (see guest.py): counts in memory and on every disk, and says on
# the console whether both still agree. It must never exit, the kernel would panic.
#
#   boot disk=000122                      what the disk held when the guest booted (000000: nothing yet)
#   tick memory=000123 disk=000122 ok     counted in memory, then read from the disk, which is one behind; then the
#                                         disk is brought up to memory
#   tick memory=000124 disk=000120 MISMATCH   the disk, or the copy in tmpfs, is not what this memory wrote last;
#                                             every later tick says so too, until the guest boots anew
#   poweroff disk=000124                  after the power button: the last thing it says
#
# Several disks are separated by commas; without any there is "-".

export PATH=/bin
/bin/busybox mount -t proc proc /proc # busybox runs its applets as /proc/self/exe
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=64k run /run

load() { # GROUP: the modules of that group, in the order that their dependencies ask for
    while read -r name; do insmod "/modules/$name.ko"; done < "/modules/$1"
}

find_disks() { # the writable ones that are longer than 1 MiB (2048 sectors)
    for node in /sys/block/vd* /sys/block/sd* /sys/block/nvme*n1; do
        [ -e "$node" ] || continue
        read -r read_only < "$node/ro"
        read -r sectors < "$node/size"
        [ "$read_only" = 0 ] && [ "$sectors" -gt 2048 ] && disks="$disks /dev/${node##*/}"
    done
}

read_disk() { # DISK: sets value to the six digits on it
    value=000000
    : > /run/seen
    dd if="$1" of=/run/seen bs=512 count=1 skip=2048 iflag=direct status=none
    read -r word digits < /run/seen
    case "$word $digits" in "HVMGR-COUNT "[0-9][0-9][0-9][0-9][0-9][0-9]) value=$digits ;; esac
}

read_disks() { # sets values to what all disks hold, agree to whether all hold $1
    values='' agree=yes
    for disk in $disks; do
        read_disk "$disk"
        values=$values,$value
        [ "$value" = "$1" ] || agree=no
    done
    values=${values#,}
    values=${values:--}
}

write_disks() { # DIGITS: on every disk and, for page cache that belongs to no disk, in tmpfs
    echo "$1" > /run/count
    echo "HVMGR-COUNT $1" > /run/next
    for disk in $disks; do
        dd if=/run/next of="$disk" bs=512 count=1 seek=2048 conv=sync,notrunc,fsync oflag=direct status=none
    done
}

await_power_button() { # leaves /run/stop behind when it was pressed
    load power
    for node in /sys/class/input/event*; do
        read -r name < "$node/device/name"
        [ "$name" = "Power Button" ] || continue
        { dd if="/dev/input/${node##*/}" of=/dev/null bs=24 count=1 status=none && : > /run/stop; } &
    done
}

# Virtio disks stand for all others: probing an IDE controller takes 0.3 s under TCG, and each PC has one.
disks=''
load virtio
find_disks
[ -n "$disks" ] || { load sd; find_disks; }

read_disks
echo # the firmware may have left half a line
echo "boot disk=$values"
count=1${values%%,*} # a leading 1 keeps the zeros and is not octal
[ -n "$disks" ] || count=1000000
write_disks "${count#1}"
await_power_button &

verdict=ok
while [ ! -e /run/stop ]; do
    last=${count#1}
    count=$((count + 1))
    read_disks "$last"
    read -r kept < /run/count
    [ "$agree$kept" = "yes$last" ] || verdict=MISMATCH
    echo "tick memory=${count#1} disk=$values $verdict"
    write_disks "${count#1}"
    sleep 0.1
done
sync
read_disks "${count#1}"
echo "poweroff disk=$values"
sleep 0.2 # a pty that closes forgets what nobody has read yet
poweroff -f
while :; do sleep 60; done
