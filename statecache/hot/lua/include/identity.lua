-- The server that runs this: run_id changes at a restart; master_replid2 and second_repl_offset at a promotion,
-- also of a server that was demoted, synced without its tail and promoted again. 12 us.
-- While it is demoted all three may be those of before, and what it holds another's: a replica ends the script, with what it says
-- to one that writes. (It would run those that only read.)
local function identity()
  local text = redis.call('INFO', 'server', 'replication')
  if not string.find(text, '\nrole:master\r', 1, true) then error({ err = 'READONLY this server is a replica' }) end
  local function field(name)
    local _, from = string.find(text, '\n' .. name .. ':', 1, true)
    return string.sub(text, from + 1, string.find(text, '\r', from, true) - 1)
  end
  return field('run_id') .. ' ' .. field('master_replid2') .. ' ' .. field('second_repl_offset')
end
