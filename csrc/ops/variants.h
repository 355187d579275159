// Which of its variants an op runs: what the caller asks for, else what a table of measurements has, else a heuristic.
#pragma once
#include <initializer_list>
#include <string>

#include "ops/check.h"

namespace fastshard {

// Use this table from now on, and no other. A line is an entry: device name or compute capability like 8.6, op, dtype,
// the buckets of counts and the sizes, all joined by commas, and variant, separated by tabs. Of several that fit, the
// last counts. Throws std::runtime_error for a line of another form.
void use_variants(const std::string& table);

// `asked`, unless that is "auto": then the entry for the op, dtype and shape on the current device; "auto" where there
// is none. Each count is put into its bucket, the power of two at or above it; the sizes must be equal.
std::string variant_for(const std::string& asked, const char* op, ScalarType dtype,
                        std::initializer_list<int64_t> counts, std::initializer_list<int64_t> sizes);

// As in tables; empty for a dtype that no variant is for.
const char* name_of(ScalarType dtype);

}  // namespace fastshard
