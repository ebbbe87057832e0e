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
# With hvmgr.load=MIB on the kernel's command line it also rewrites that much memory, with hvmgr.write=MIB as much of its
# first disk behind the first 4 MiB, without end. With hvmgr.check=COUNT that many blocks of 64 KiB behind the counts are
# written over and over, one after the other, each with a checksum of itself; what a block holds is read back before
# it is written again, and when it is not what this memory wrote last, the ticks say MISMATCH as well.
#
#   HVMGR-BLOCK PLACE ROUND               line by line, cut off after 65504 bytes, then the MD5 of these as 32 digits
#
# Several disks are separated by commas; without any there is "-".
#
# On a disk the counts lie in two sectors by turns, even ones in the first. With one sector a memory that was saved
# between its read and its write would paint over another moment's disk unseen; so the older count gives it away.
# Both dd have a buffer of a page, for busybox aligns no smaller one, and goes through the page cache where the kernel
# refuses an unaligned one: then a page would be written, the older count with it.

export PATH=/bin
/bin/busybox mount -t proc proc /proc # busybox runs its applets as /proc/self/exe
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=64k run /run

load() { # GROUP: the modules of that group, in the order that their dependencies ask for
    while read -r name; do insmod "/modules/$name.ko"; done < "/modules/$1"
}

find_disks() { # the writable ones that hold both sectors, which are those behind the first MiB
    for node in /sys/block/vd* /sys/block/sd* /sys/block/nvme*n1; do
        [ -e "$node" ] || continue
        read -r read_only < "$node/ro"
        read -r sectors < "$node/size"
        [ "$read_only" = 0 ] && [ "$sectors" -gt 2049 ] && disks="$disks /dev/${node##*/}"
    done
}

digits_of() { # WORD DIGITS: sets digits to what a line of a sector says
    digits=000000
    case "$1 $2" in "HVMGR-COUNT "[0-9][0-9][0-9][0-9][0-9][0-9]) digits=$2 ;; esac
}

read_disk() { # DISK: sets value to the newer and older to the other count on it
    : > /run/seen
    dd if="$1" of=/run/seen bs=4096 count=1 skip=256 iflag=direct status=none
    { read -r word1 rest1; read -r word2 rest2; } < /run/seen # read skips the zeros that fill a sector
    digits_of "$word1" "$rest1"
    value=$digits
    digits_of "$word2" "$rest2"
    older=$digits
    [ "$value" -ge "$older" ] || { older=$value; value=$digits; }
}

read_disks() { # NEWER OLDER: sets values to the newer counts of all disks, agree to whether all hold just these two
    values='' agree=yes
    for disk in $disks; do
        read_disk "$disk"
        values=$values,$value
        [ "$value$older" = "$1$2" ] || agree=no
    done
    values=${values#,}
    values=${values:--}
}

write_disks() { # DIGITS SECTOR…: on every disk and, for page cache that belongs to no disk, in tmpfs
    echo "$1" > /run/count
    echo "HVMGR-COUNT $1" > /run/next
    shift
    for disk in $disks; do
        for sector in "$@"; do
            dd if=/run/next of="$disk" ibs=512 obs=4096 seek=$((1048576 + 512 * sector)) \
                conv=sync,notrunc,fsync oflag=direct,seek_bytes status=none
        done
    done
}

await_power_button() { # from when it returns, a press leaves /run/stop behind
    load power
    for node in /sys/class/input/event*; do
        read -r name < "$node/device/name"
        [ "$name" = "Power Button" ] || continue
        exec 3< "/dev/input/${node##*/}"
        { dd of=/dev/null bs=24 count=1 status=none <&3 && : > /run/stop; } &
    done
}

rewrite_memory() { # MIB: that much of it is written over and over, as fast as it goes
    mkdir /load
    mount -t tmpfs -o size=$(($1 + 2))m load /load
    head -c 1048576 /dev/zero | tr '\000' '\125' > /load/piece
    while :; do
        place=0
        while [ "$place" -lt "$1" ]; do
            dd if=/load/piece of=/load/data bs=1M count=1 seek="$place" conv=notrunc status=none
            place=$((place + 1))
        done
    done
}

rewrite_disk() { # DISK MIB: that much of it is written over and over, as fast as it goes
    head -c 1048576 /dev/zero | tr '\000' '\252' > /piece
    while :; do
        place=0
        while [ "$place" -lt "$2" ]; do
            dd if=/piece of="$1" bs=1M count=1 seek=$((4 + place)) conv=notrunc oflag=direct status=none
            place=$((place + 1))
        done
    done
}

check_blocks() { # DISK COUNT: without end
    mkdir /blocks
    mount -t tmpfs -o size=$((64 * $2 + 256))k blocks /blocks
    round=1000000
    while :; do
        round=$((round + 1))
        place=0
        while [ "$place" -lt "$2" ]; do
            if [ -e "/blocks/$place" ]; then
                dd if="$1" bs=64k count=1 skip=$((17 + place)) iflag=direct status=none | cmp -s - "/blocks/$place" || : > /run/broken
            fi
            yes "HVMGR-BLOCK $place ${round#1}" | head -c 65504 > /blocks/next
            md5sum < /blocks/next | head -c 32 >> /blocks/next
            dd if=/blocks/next of="$1" bs=64k count=1 seek=$((17 + place)) conv=notrunc oflag=direct status=none
            mv /blocks/next "/blocks/$place"
            place=$((place + 1))
        done
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
write_disks "${count#1}" 0 1
await_power_button
for word in $(cat /proc/cmdline); do
    case $word in
        hvmgr.load=*) rewrite_memory "${word#*=}" & ;;
        hvmgr.write=*) for disk in $disks; do rewrite_disk "$disk" "${word#*=}" & break; done ;;
        hvmgr.check=*) for disk in $disks; do check_blocks "$disk" "${word#*=}" & break; done ;;
    esac
done

mkfifo /run/never
exec 9<> /run/never
verdict=ok last=${count#1}
while [ ! -e /run/stop ]; do
    before=$last last=${count#1}
    count=$((count + 1))
    read_disks "$last" "$before"
    read -r kept < /run/count
    [ "$agree$kept" = "yes$last" ] || verdict=MISMATCH
    [ ! -e /run/broken ] || verdict=MISMATCH
    echo "tick memory=${count#1} disk=$values $verdict"
    write_disks "${count#1}" $((count & 1))
    read -r -t 0.1 nothing <&9 # the shell's own sleep: a process for it costs a fifth of a tick under TCG
done
sync
read_disks
echo "poweroff disk=$values"
sleep 0.2 # a pty that closes forgets what nobody has read yet
poweroff -f
while :; do sleep 60; done
