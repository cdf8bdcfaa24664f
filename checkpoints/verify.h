#pragma once
#include "checkpoints/manifest.h"
#include "checkpoints/shard.h"

namespace checkpoints {

// Reads every shard below `directory` again and compares sizes, contents and checksums of files and tensors
// with the manifest; CheckpointError names the first that differs.
void verify_shards(const Path& directory, const Manifest& manifest);

}  // namespace checkpoints
