#!/bin/sh
# Mounts the root. A failure ends the machine, unless guestagent.on_failure=serve leaves it to dracut.

if [ "$root" = guestagent ] && ! ismounted "$NEWROOT"; then
    while read -r module; do
        modprobe -q "$module" || warn "guestagent: module $module is not loaded"
    done < /etc/guestagent/module-names
    guestagent-mount-root --target "$NEWROOT" ||
        die "guestagent: no verified root is mounted"
fi
