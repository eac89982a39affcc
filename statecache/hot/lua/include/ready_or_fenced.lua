-- Refuses unless the partition is of this stamp, served by the server that was found true, and ready; or, with `fenced`,
-- under this very recovery and served by the server that its fence met. `*` is a dry run's, which reads what there is.
local function refusal(meta, here, fenced)
  if fenced == '*' then return false end
  local m = redis.call('HMGET', meta, 'epoch', 'owner', 'status', 'identity')
  if m[1] ~= EPOCH or m[2] ~= OWNER then return 'EPOCH' end
  if m[3] ~= (fenced == '' and 'ready' or 'recovering') then return 'RECOVERING' end
  if here ~= (fenced == '' and m[4] or fenced) then return 'IDENTITY' end
  return false
end
