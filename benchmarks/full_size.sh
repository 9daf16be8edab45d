#!/bin/sh
# Measure everything at the released shapes, in calls of at most ten minutes each on one H100.
# Call it again to go on: parts that are finished on this device are skipped.
#
#   sh benchmarks/full_size.sh towers    # writes 34 GB into $FOLDER; loading, towers, bridge, expected output, a folder
#   sh benchmarks/full_size.sh edits     # writes 41 GB more; whole edits, stages, extra memory, strength 0
#   sh benchmarks/full_size.sh few       # an edit in four steps beside one in forty
#   sh benchmarks/full_size.sh modes     # edits capped at 16, 24, 12 and 48 GB, each in a process of its own
#   sh benchmarks/full_size.sh devices   # two GPUs: a folder's features and an evaluation, on one and on both
#
# FOLDER is where checkpoints lie, OUTPUT where results.json, parts.json and figures go.
set -eu
: "${FOLDER:=/dev/shm/qwen-vision-bridge}" "${OUTPUT:=$FOLDER/benchmarks}" "${MINUTES:=9}" "${MORE:=}"
case "${1:-}" in
    towers) parts=extraction,target-tower,source-tower,bridge,expected-output,stream,compiled-tower ;;
    edits) parts=edits ;;
    few) parts=few-steps ;;
    modes) parts=mode-16,mode-24,mode-12,mode-48 ;;
    devices) parts=devices ;;
    *) echo "usage: sh benchmarks/full_size.sh towers|edits|few|modes|devices" >&2; exit 2 ;;
esac
# shellcheck disable=SC2086
python3 benchmark.py --family qwen --random-weights --folder "$FOLDER" --output "$OUTPUT" --parts "$parts" \
    --minutes "$MINUTES" $MORE || status=$?
if [ -n "${OUT:-}" ]; then cp "$OUTPUT"/*.json "$OUTPUT"/*.png "$OUT"/ 2>/dev/null || true; fi
exit "${status:-0}"
