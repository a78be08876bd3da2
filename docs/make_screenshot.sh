#!/usr/bin/env bash
# Makes the picture of a report that the README shows: docs/make_screenshot.sh RUN_DIR [OUT.png] [WIDTH] [HEIGHT]
# Needs a Chromium or Chrome on the PATH (or its path in CHROMIUM). `COLOURS=dark` takes the dark palette.
set -euo pipefail
run_dir=${1:?usage: docs/make_screenshot.sh RUN_DIR [OUT.png] [WIDTH] [HEIGHT]}
out=${2:-$(dirname "$0")/report.png}
report=$(realpath "$run_dir")/report.html
[ -f "$report" ] || { echo "$report: not there; write it with: posttrain report $run_dir" >&2; exit 2; }
browser=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
[ -n "$browser" ] || { echo "no Chromium found; install one or set CHROMIUM to its path" >&2; exit 2; }
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
scheme=1
[ "${COLOURS:-light}" = dark ] && scheme=0
"$browser" --headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-sync \
  --disable-background-networking --disable-component-update --user-data-dir="$profile" \
  --blink-settings=preferredColorScheme=$scheme --window-size="${3:-1280},${4:-1240}" --virtual-time-budget=8000 \
  --screenshot="$(realpath -m "$out")" "file://$report" 2>/dev/null
echo "$out"
