#!/bin/bash
# dracut module: the root is what the guestagent.* settings on the kernel command line name.
# Goes to /usr/lib/dracut/modules.d/90guestagent; is taken with `dracut --add guestagent`.

check() {
    /usr/bin/python3 -c 'import rootfs.hooks.install' 2>/dev/null || return 1
    return 255 # only where it is asked for
}

depends() {
    echo base
}

installkernel() {
    local names
    # an image for any machine of this kernel: what this one has now does not matter
    names=$(/usr/bin/python3 -m rootfs.hooks.install --kernel "$kernel" "$initdir") || return 1
    # shellcheck disable=SC2086  # one argument for each name
    hostonly='' instmods $names
}

install() {
    inst_multiple modprobe
    inst_hook cmdline 90 "$moddir/parse-guestagent.sh"
    inst_hook mount 90 "$moddir/mount-guestagent.sh"
}
