#pragma once
#include "checkpoints/manifest.h"
#include "checkpoints/shard.h"

namespace checkpoints {

// The dataset that holds one piece of a tensor.
Dataset dataset_of(const TensorEntry& tensor, const Piece& piece);

// Reads one piece, band by band, and compares its checksum.
void read_piece(const ShardReader& shard, const TensorEntry& tensor, const Piece& piece,
                const ShardReader::Band& fn);

// Reads every shard below `directory` again and compares sizes, contents and checksums of files and tensors
// with the manifest; CheckpointError names the first that differs.
void verify_shards(const Path& directory, const Manifest& manifest);

// Checkpoints that this process has verified, so that a save does not read old ones again to delete an older
// one. Known as long as no file in it is replaced, resized or written to.
void remember_verified(const Path& checkpoint);
bool known_verified(const Path& checkpoint);

}  // namespace checkpoints
