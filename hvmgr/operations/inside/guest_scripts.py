"""What the shell of a running guest is told, so that a file gets its place and none of its users can turn that against the guest.

The agent is root there, and whoever owns a folder can put a link, or another folder, under any name in it at any moment. So what is
new is made in a folder that nobody but root can reach: the deepest one on the way to the place, where it and all above it are root's.
From there it is moved to its name, which follows no link, in a folder that was entered and is the one that was named.

Each script is for any POSIX shell with the usual programs (GNU's or busybox).
"""

from __future__ import annotations

REFUSED = 9  # exit code: it would not be safe, and why is said
TAKEN = 7  # something has the name by now
NEW = "new"  # what is made, in the folder of its own

# $1 is a path. A link to a folder counts as one: what is renamed to its name would go into that folder.
LOOK = 'if [ -d "$1" ]; then echo folder; elif [ -e "$1" ] || [ -L "$1" ]; then echo file; else echo none; fi'
HASH = 'sha256sum < "$1"'
CLEAN = 'rm -rf -- "$1"'

_ENTER = f"""
cd -P -- "$1" || exit
here=$(pwd -P)
[ "$here" = "$1" ] || {{ echo "$1 leads through a link to $here: name that"; exit {REFUSED}; }}
"""

# $1 the folder, $2 a name of our own; the last line is "in " and how many names of the folder lead to where that is made.
BEGIN = f"""
set -f
{_ENTER}
is_roots() {{
    set -- $(stat -c '%u %a' -- "$1")
    [ "$1" = 0 ] && {{ [ $((0$2 & 022)) = 0 ] || [ $((0$2 & 01000)) != 0 ]; }}
}}
at=/ rest=${{1#/}} place= depth=-1
while is_roots "$at"; do
    place=$at depth=$((depth + 1))
    [ "$at" != "$1" ] || break
    at=${{at%/}}/${{rest%%/*}} rest=${{rest#*/}}
done
[ -n "$place" ] && [ "$(stat -c %d -- "$place")" = "$(stat -c %d .)" ] || {{
    echo "others may write in $at, and no folder above it on its file system is root's alone"
    exit {REFUSED}
}}
mkdir -m 700 -- "${{place%/}}/$2" && echo "in $depth"
"""

# $1 the folder, $2 where it was made, $3 its name, then owner:group, mode, seconds since 1970, whether it replaces, a link's target
_PUT = f"""
if [ "$7" = replace ]; then
    mv -fT -- "$2/{NEW}" "./$3" || exit
elif ln -T -- "$2/{NEW}" "./$3" 2> /dev/null; then
    rm -f -- "$2/{NEW}"
else
    mv -nT -- "$2/{NEW}" "./$3"
    if [ -e "$2/{NEW}" ] || [ -L "$2/{NEW}" ]; then echo "$3 cannot be placed, or is there by now"; exit {TAKEN}; fi
fi
rmdir -- "$2"
if command -v restorecon > /dev/null 2>&1; then restorecon "./$3"; fi
exit 0
"""
FILE = f"""{_ENTER}
chown "$4" "$2/{NEW}" && chmod "$5" "$2/{NEW}" && touch -d "@$6" "$2/{NEW}" || exit
{_PUT}"""
FOLDER = f"""{_ENTER}
mkdir "$2/{NEW}" && chown "$4" "$2/{NEW}" && chmod "$5" "$2/{NEW}" || exit
{_PUT}"""
LINK = f"""{_ENTER}
ln -s -- "$8" "$2/{NEW}" && chown -h "$4" "$2/{NEW}" || exit
{_PUT}"""

# $1 the place, $2 where it was made, which goes last: says the hash of a file that got there, and fails where it did not.
IS_PLACED = """
[ ! -e "$2" ] || exit 1
if [ -f "$1" ] && [ ! -L "$1" ]; then sha256sum < "$1"; else [ -d "$1" ] || [ -L "$1" ]; fi
"""
