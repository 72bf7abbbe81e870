// The module's kernels by the names that Python launches them by.
#pragma once

#include <string>

namespace resnet_fast {

// Called by static initialisers, while the module loads.
void name_kernel(const std::string& name, const void* function);

}  // namespace resnet_fast
