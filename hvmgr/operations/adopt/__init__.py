"""VMs that libvirt has already become hvmgr's, and go back to libvirt."""
