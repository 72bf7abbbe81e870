// Kernels of this module by the names under which the launch seam of Python knows them.
#pragma once

#include <string>

namespace resnet_fast {

// Called while the module is loaded.
void name_kernel(const std::string& name, const void* function);

}  // namespace resnet_fast
