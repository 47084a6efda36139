#!/bin/sh
# Prints the path of ccache if it works around the compiler named here: it fails where its folder cannot be written.
ccache=$(command -v ccache) || exit 0
folder=$(mktemp -d) || exit 0
trap 'rm -rf "$folder"' EXIT
: >"$folder/empty.cpp"
if "$ccache" "$@" -c "$folder/empty.cpp" -o "$folder/empty.o" >/dev/null 2>&1; then echo "$ccache"; fi
