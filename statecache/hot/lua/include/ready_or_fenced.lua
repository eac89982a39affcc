-- Refuses unless the partition is of this stamp, served by the server that was found true, and ready; or, with `fenced`,
-- under this very recovery and served by the server that its fence met.
local function refusal(meta, here, fenced)
  local m = redis.call('HMGET', meta, 'epoch', 'owner', 'status', 'identity')
  if m[1] ~= EPOCH or m[2] ~= OWNER then return 'EPOCH' end
  if m[3] ~= (fenced == '' and 'ready' or 'recovering') then return 'RECOVERING' end
  if here ~= (fenced == '' and m[4] or fenced) then return 'IDENTITY' end
  return false
end
