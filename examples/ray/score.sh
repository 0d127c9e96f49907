#!/bin/bash
# Scores a cache on a Ray cluster. Run it where the cluster is reached, with ROOT and TEACHER as its workers see them.
set -euo pipefail

stillroom score score.yaml --root "$ROOT" --teacher.model "$TEACHER" --ray.address "${RAY_ADDRESS:-auto}"
