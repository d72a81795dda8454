# What test_sanitizers.sh, test_emulated.sh and test_aarch64.sh share: the tools they need, a Python for the kernel tests, and a driver; sourced, not run.
#
#   QWEN15_PYTHON   the interpreter to use (3.9 to 3.12; default: the first that python3, python3.12, ... offers)
#   QWEN15_VENV     virtual environment with numpy and pytest (default: .venv in the checkout when test.sh has made it,
#                   else .venv-kernels, which is made)

driver_venv=${QWEN15_VENV:-}
QWEN15_VENV=unused source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# need TOOL PACKAGE [TOOL PACKAGE]...: installs Debian packages for tools that are missing; where it may not, says by name what is
# missing and exits with 77.
need() {
    local missing=() packages=()
    while [ $# -gt 0 ]; do
        if ! command -v "$1" > /dev/null; then
            missing+=("$1")
            packages+=("$2")
        fi
        shift 2
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        echo "skipped: ${missing[*]} not found. Install it (Debian: apt-get install ${packages[*]})" >&2
        exit 77
    fi
    say "installing ${packages[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" > /dev/null
}

# need_header HEADER PACKAGE: the same for a header of the compiler's.
need_header() {
    echo "#include <$1>" | g++ -fsyntax-only -x c++ - 2> /dev/null && return
    need "$1" "$2"
}

# A Python with numpy and pytest goes first on PATH; MindSpore is not needed.
kernel_tests_python() {
    local has="import numpy, pytest, pytest_timeout"
    for venv in ${driver_venv:-"$root/.venv" "$root/.venv-kernels"}; do
        if "$venv/bin/python" -c "$has" 2> /dev/null; then
            export PATH=$venv/bin:$PATH
            return
        fi
    done
    local python
    python=$(find_python)
    say "virtual environment $venv ($("$python" --version))"
    "$python" -m venv "$venv"
    export PATH=$venv/bin:$PATH
    pip_install numpy 'pytest>=7' pytest-timeout
}

# build_driver FOLDER COMPILER [BUILD ARGUMENT]... -- [COMPILER FLAG]...: the library and its driver, in FOLDER.
build_driver() {
    local folder=$1 compiler=$2 arguments=()
    shift 2
    while [ "$1" != -- ]; do
        arguments+=("$1")
        shift
    done
    shift
    (cd "$root/research/qwen1_5" && python -m qwen15.kernels.build --output_dir "$folder" "${arguments[@]}") > /dev/null
    "$compiler" -std=c++17 -O1 -g -Wall -Wextra -pthread "$@" "$root/tests/kernels_driver.cpp" -L"$folder" -lqwen15_kernels \
        -Wl,-rpath,'$ORIGIN' -o "$folder/driver"
}
