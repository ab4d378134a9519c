// Requests to the server.

// Returns the JSON of a response. Throws its line for people, with the status, if it is an error.
export async function getJson(url, options) {
  const response = await fetch(url, options);
  const body = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) throw Object.assign(new Error(body.error), { status: response.status });
  return body;
}

export function describeError(error) {
  return error instanceof TypeError ? "The server cannot be reached." : `Error: ${error.message}`;
}
