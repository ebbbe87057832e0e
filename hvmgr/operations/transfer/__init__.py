"""Single disks as streams: out as a whole or as a delta, in again, and all of them under Xen's word, VDI."""
