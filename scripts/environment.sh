#!/bin/sh
# Make or renew the virtual environment: environment.sh VENV PYTHON EXTRA. The Makefile calls it when a stamp is old.
# On failure it says in one line what is missing and what to type, and exits 1.
set -u
venv=$1 python=$2 extra=$3
stamp="$venv/.ready-$extra"
inputs=$(cat setup.py settings.ini constraints.txt scripts/environment.sh | cksum)

fail() {
    printf '\n%s\n' "$*" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 ||
    fail "No Python: '$python' is not found. Install Python 3.10 or newer, or name yours: make PYTHON=/path/to/python3"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "'$python' does not run. Install Python 3.10 or newer, or name yours: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, '$python' is $version. Name a newer one: make PYTHON=/path/to/python3"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        fail "Python's venv module is missing. On Debian or Ubuntu type: apt-get install python3-venv   and then make again."
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
        fail "$venv is there but is no virtual environment. Move it away, or choose another place: make VENV=/path/to/venv"
    fi
    echo "Making a virtual environment in $venv (Python $version)"
    "$python" -m venv --clear "$venv" >"$venv.log" 2>&1 ||
        { cat "$venv.log" >&2; rm -f "$venv.log"; fail "The virtual environment could not be made in $venv: see above."; }
    rm -f "$venv.log"
fi

# Newer files, as after a change of branch, need not be other files: then nothing is to be done, and no network needed.
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$inputs" ]; then
    touch "$stamp"
    exit 0
fi

log="$venv/pip.log"
rm -f "$log"
echo "Installing hific_nb[$extra] and what it needs into $venv; the first time this downloads PyTorch"
[ -t 1 ] || quiet="--quiet --progress-bar off"
if ! "$venv/bin/python" -m pip install ${quiet:-} --disable-pip-version-check --retries 2 --log "$log" \
        -c constraints.txt -e ".[$extra]"; then
    if grep -qE 'NewConnectionError|ConnectTimeout|ConnectionError|ProxyError|Connection refused|name resolution|SSLError' \
            "$log" 2>/dev/null; then
        fail "No network: pip reached no package index. Connect and type make again, or name a mirror: PIP_INDEX_URL=URL make"
    fi
    if grep -q 'No space left on device' "$log" 2>/dev/null; then
        fail "The disk is full: the environment needs some 3 GB (more with PyTorch for GPUs). Make room, then type make again."
    fi
    fail "pip could not install the packages: its last lines are above, the whole story is in $log"
fi
echo "$inputs" >"$stamp"
