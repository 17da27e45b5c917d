#!/bin/sh
# Says that a root is known, so that dracut looks for no other.

if getarg guestagent.layer= > /dev/null || getarg guestagent.manifest= > /dev/null; then
    # shellcheck disable=SC2034  # both are read by dracut
    root=guestagent
    # shellcheck disable=SC2034
    rootok=1
fi
