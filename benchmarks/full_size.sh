#!/bin/sh
# Every figure of the benchmark at the released shapes, in calls that each end within ten minutes on one H100.
# Call it again to go on; what is finished on this device is not done again.
#
#   sh recipes/full_size.sh towers    # writes 34 GB into $FOLDER; loading, towers, bridge, seed's numbers, a folder
#   sh recipes/full_size.sh edits     # writes 41 GB more; whole edits, stages, extra memory, strength 0
#   sh recipes/full_size.sh modes     # edits capped at 16, 24, 12 and 48 GB, each in a process of its own
#   sh recipes/full_size.sh devices   # two GPUs: a folder's features and an evaluation, on one and on both
#
# FOLDER is where checkpoints lie, OUTPUT where results.json, parts.json and figures go.
set -eu
: "${FOLDER:=/dev/shm/qwen-vision-bridge}" "${OUTPUT:=$FOLDER/benchmarks}" "${MINUTES:=9}" "${MORE:=}"
case "${1:-}" in
    towers) parts=extraction,target-tower,source-tower,bridge,seed-numbers,stream,compiled-tower ;;
    edits) parts=edits ;;
    modes) parts=mode-16,mode-24,mode-12,mode-48 ;;
    devices) parts=devices ;;
    *) echo "say towers, edits, modes or devices" >&2; exit 2 ;;
esac
# shellcheck disable=SC2086
python3 benchmark.py --family qwen --random-weights --folder "$FOLDER" --output "$OUTPUT" --parts "$parts" \
    --minutes "$MINUTES" $MORE || status=$?
if [ -n "${OUT:-}" ]; then cp "$OUTPUT"/*.json "$OUTPUT"/*.png "$OUT"/ 2>/dev/null || true; fi
exit "${status:-0}"
